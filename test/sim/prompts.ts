// Owns what each tenant has ever asked, or been told: of a prompt, no more can be cached.

interface Branch {
  children: Map<number, Branch>
}

export class AskedPrompts {
  private readonly tenants = new Map<string, Branch>()

  /** Adds a prompt. Returns how many of its tokens began one before, of the same tenant. */
  ask(tenant: string, prompt: Iterable<number>): number {
    let branch = this.tenants.get(tenant) ?? { children: new Map() }
    this.tenants.set(tenant, branch)
    let common = 0
    for (const token of prompt) {
      const known = branch.children.get(token)
      if (known) common++
      const next: Branch = known ?? { children: new Map() }
      branch.children.set(token, next)
      branch = next
    }
    return common
  }
}
