// Owns the program `lattice`: which commands there are, and how argv reaches the one that is meant.
// A command's code is loaded only when it runs, so that help is instant.

import { Command } from 'commander'
import { report } from './cli/report.ts'
import { version } from './version.ts'

interface Entry {
  name: string
  group: string
  summary: string
  load: () => Promise<Command>
}

const COMMANDS: readonly Entry[] = [
  {
    name: 'serve',
    group: 'Use a model:',
    summary: 'answer the OpenAI API over HTTP',
    load: async () => (await import('./cli/serve.ts')).serveCommand(),
  },
  {
    name: 'gateway',
    group: 'Use a model:',
    summary: 'answer the OpenAI API by asking another machine over datagrams',
    load: async () => (await import('./cli/gateway.ts')).gatewayCommand(),
  },
  {
    name: 'run',
    group: 'Use a model:',
    summary: 'answer one prompt on stdout, without a server',
    load: async () => (await import('./cli/run.ts')).runCommand(),
  },
  {
    name: 'chat',
    group: 'Use a model:',
    summary: 'talk with a model in the terminal, without a server',
    load: async () => (await import('./cli/chat.ts')).chatCommand(),
  },
  {
    name: 'pull',
    group: 'Keep models:',
    summary: 'fetch a model into the local store',
    load: async () => (await import('./cli/pull.ts')).pullCommand(),
  },
  {
    name: 'ls',
    group: 'Keep models:',
    summary: 'list the models in the local store',
    load: async () => (await import('./cli/ls.ts')).lsCommand(),
  },
  {
    name: 'rm',
    group: 'Keep models:',
    summary: 'remove a model from the local store',
    load: async () => (await import('./cli/rm.ts')).rmCommand(),
  },
  {
    name: 'ps',
    group: 'Look inside:',
    summary: "show a server's requests and the KV memory of each",
    load: async () => (await import('./cli/ps.ts')).psCommand(),
  },
  {
    name: 'offload',
    group: 'Look inside:',
    summary: "move a session out of a server's memory",
    load: async () => (await import('./cli/sessions.ts')).offloadCommand(),
  },
  {
    name: 'reload',
    group: 'Look inside:',
    summary: "bring a session back into a server's memory",
    load: async () => (await import('./cli/sessions.ts')).reloadCommand(),
  },
  {
    name: 'top',
    group: 'Look inside:',
    summary: "watch a server's KV memory, page by page",
    load: async () => (await import('./cli/top.ts')).topCommand(),
  },
  {
    name: 'prefix',
    group: 'Look inside:',
    summary: "keep the beginnings of prompts in a server's memory",
    load: async () => (await import('./cli/prefix.ts')).prefixCommand(),
  },
  {
    name: 'net',
    group: 'Look inside:',
    summary: "attach a server's datagram path to a network interface",
    load: async () => (await import('./cli/net.ts')).netCommand(),
  },
  {
    name: 'inspect',
    group: 'Look inside:',
    summary: 'describe a model file, this CPU or GPU, or the error codes',
    load: async () => (await import('./cli/inspect.ts')).inspectCommand(),
  },
  {
    name: 'bench',
    group: 'Look inside:',
    summary: 'measure a server, KV memory, the CPU, GPU or datagram path',
    load: async () => (await import('./cli/bench.ts')).benchCommand(),
  },
]

const FOOTER = `
Start with:
  lattice serve                          the default model on http://127.0.0.1:8080
  lattice run "Why is the sky blue?"     one answer, right here

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 130 interrupted.
docs/cli.md describes each command and every environment variable.`

// `lattice ls | head -1`: when the reader has gone, there is nobody left to tell.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  process.exit(error.code === 'EPIPE' ? 0 : report(error))
})
process.on('uncaughtException', (error) => process.exit(report(error)))
process.exitCode = await main(process.argv.slice(2)).then(() => process.exitCode ?? 0, report)

async function main(argv: string[]): Promise<void> {
  const program = new Command('lattice')
    .description('An operating-system layer for LLM inference, and the engine that proves it.')
    .usage('COMMAND [OPTIONS]')
    .version(version(), '-V, --version', 'print the version')
    .helpOption('-h, --help', 'print this help')
    .helpCommand('help [COMMAND]', "print a command's help")
    .addHelpText('after', FOOTER)
  const named = argv.filter((argument) => !argument.startsWith('-'))
  const meant = named[0] === 'help' ? named[1] : named[0]
  for (const { name, group, summary, load } of COMMANDS) {
    const command = name === meant ? await load() : new Command(name)
    program.addCommand(command.summary(summary).helpGroup(group))
  }
  settle(program)
  await program.parseAsync(argv, { from: 'user' })
}

/** One way to fail and one look of help, for the program and all commands below it. */
function settle(command: Command): void {
  command.exitOverride().configureOutput({
    outputError: () => {}, // thrown as well: report() prints it
    getOutHelpWidth: () => Math.min(process.stdout.columns ?? 80, 100),
    getErrHelpWidth: () => Math.min(process.stderr.columns ?? 80, 100),
  })
  if (command.description() === '') command.description(command.summary())
  for (const child of command.commands) {
    child.helpOption('-h, --help', 'print this help')
    if (child.commands.length > 0) child.helpCommand('help [COMMAND]', "print a command's help")
    settle(child)
  }
}
