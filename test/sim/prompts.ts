// Owns what each tenant has ever asked: how much of a prompt can be cached at most.

interface Branch {
  children: Map<number, Branch>
}

export class AskedPrompts {
  private readonly tenants = new Map<string, Branch>()

  /** Adds a prompt. Returns how many of its tokens began one before, of the same tenant. */
  ask(tenant: string, prompt: Int32Array): number {
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
