// Owns a bad network for tests: a UDP port whose datagrams go on to a server and back, some lost,
// some twice, some late. Seeded, so that the same test sees the same fate.

import { createSocket, type Socket } from 'node:dgram'
import { Random } from '../support/random.ts'

export interface World {
  seed: number
  /** Where what befalls: towards the server, from it, or both. */
  only?: 'there' | 'back'
  /** Shares of datagrams. */
  loss: number
  repeats: number
  late: number
  lateMs: number
}

/**
 * What the world does to each datagram that is given to it.
 * @returns a function that has it sent, or not, or twice, or later
 */
export function befall(world: World): (way: World['only'], send: () => void) => void {
  const random = new Random(world.seed)
  return (way, send) => {
    if (world.only !== undefined && world.only !== way) return send()
    if (random.next() < world.loss) return
    const copies = random.next() < world.repeats ? 2 : 1
    for (let i = 0; i < copies; i++) {
      if (random.next() < world.late) setTimeout(send, random.next() * world.lateMs)
      else send()
    }
  }
}

/** Returns the port to which a client sends instead. Open until the process ends. */
export async function relay(world: World, address: string, port: number): Promise<number> {
  const pass = befall(world)
  const towards = new Map<number, Socket>()
  const near = createSocket('udp4')
  near.on('message', (message, from) => {
    let far = towards.get(from.port)
    if (!far) {
      far = createSocket(address.includes(':') ? 'udp6' : 'udp4')
      far.on('message', (answer) => {
        pass('back', () => near.send(answer, from.port, from.address))
      })
      towards.set(from.port, far)
    }
    const to = far
    pass('there', () => to.send(message, port, address))
  })
  await new Promise<void>((resolve) => near.bind(0, '127.0.0.1', resolve))
  return near.address().port
}
