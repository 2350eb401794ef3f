// Owns the system's packages that some tests need: the network's tools, libbpf, the compiler that
// built bpf/*.o, and what a client that is not ours is written in. As root on Debian what is
// missing is installed; elsewhere those tests say what they skip.

import { execFileSync } from 'node:child_process'
import { existsSync } from 'node:fs'

/** Any file that says that it is there. */
const PACKAGES: readonly [name: string, ...files: string[]][] = [
  ['iproute2', '/sbin/ip', '/bin/ip', '/usr/sbin/ip', '/usr/bin/ip'],
  ['libbpf1', '/usr/lib/x86_64-linux-gnu/libbpf.so.1'],
  ['libbpf-dev', '/usr/include/bpf/bpf_helpers.h'],
  ['linux-libc-dev', '/usr/include/linux/bpf.h'],
  ['clang-19', '/usr/bin/clang-19'],
  ['llvm-19', '/usr/bin/llvm-strip-19'],
  ['python3', '/usr/bin/python3', '/usr/local/bin/python3'],
]

/** Installs what is missing, if this is Debian and we may. */
export function installSystemPackages(): void {
  const missing = PACKAGES.filter(([, ...files]) => !files.some((file) => existsSync(file)))
  if (missing.length === 0) return
  const names = missing.map(([name]) => name)
  if (process.getuid?.() !== 0 || !existsSync('/etc/debian_version')) {
    console.log(`tests without ${names.join(', ')}: install them to run all`)
    return
  }
  console.log(`installing ${names.join(', ')}`)
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' }
  const apt = (...args: string[]): void => {
    execFileSync('apt-get', ['-qq', ...args], { env, stdio: ['ignore', 'ignore', 'inherit'] })
  }
  try {
    apt('update')
    apt('install', '--yes', '--no-install-recommends', ...names)
  } catch (thrown) {
    // The tests that need them say so.
    console.log(`tests without ${names.join(', ')}: ${String(thrown)}`)
  }
}
