// Owns `lattice rm`: removes models from the local store.

import { Command } from 'commander'
import { LatticeError } from '../errors.ts'
import { info } from '../log.ts'
import { Store } from '../model/store.ts'

export function rmCommand(): Command {
  return new Command('rm')
    .description('remove models from the local store')
    .argument('<names...>', 'names as `lattice ls` shows them')
    .option('--json', 'print the names that were removed')
    .addHelpText('after', '\nFiles that are used in place are forgotten, never deleted.')
    .action(async (names: string[], options: { json?: boolean }) => {
      const store = new Store()
      const missing: string[] = []
      const removed: string[] = []
      for (const name of names) {
        const gone = await store.locked(name, () => store.remove(name))
        ;(gone ? removed : missing).push(name)
        if (gone && !options.json) info(`${name} is removed`)
      }
      if (options.json) process.stdout.write(`${JSON.stringify({ removed })}\n`)
      if (missing.length === 0) return
      throw new LatticeError('model_not_found', `There is no model ${missing.join(', ')}.`, {
        todo: '`lattice ls` lists what is there.',
      })
    })
}
