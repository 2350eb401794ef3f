// Owns one of several servers on a port for the steering test: it answers with its number, and
// takes "load N" and "leave" on stdin.

import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { createInterface } from 'node:readline'
import { Steering } from '../../src/net/steer.ts'

const [number = '0', port = '0'] = process.argv.slice(2)

const server = createServer((_request, response) => response.end(number))
server.keepAliveTimeout = 1
server.listen({ host: '127.0.0.1', port: Number(port), reusePort: true }, () => {
  const address = server.address() as AddressInfo
  const { fd } = (server as unknown as { _handle: { fd: number } })._handle
  const steering = Steering.join(fd, address.port)
  console.log(address.port)
  createInterface({ input: process.stdin }).on('line', (line) => {
    if (line === 'leave') steering.leave()
    else steering.setLoad(Number(line.split(' ')[1]))
    console.log('done')
  })
})
