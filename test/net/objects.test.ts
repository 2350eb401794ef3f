// Catches a compiled program that is not its source's, that comes near what the verifier allows, or
// whose layout is not the one that we write to.

import assert from 'node:assert/strict'
import { globSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { canCompile, CLANG, compile } from '../../tools/bpf.ts'
import { compile as compileNative, missing as cannotLink, OBJECT } from '../../tools/native.ts'
import { BpfObject } from '../../src/ffi/libbpf.ts'
import { Ingress } from '../../src/net/ingress.ts'
import { BUCKET, CONTROL, REQUEST, TENANT, TENANT_USE } from '../../src/net/ingress-maps.ts'
import { TENANTS_MAX } from '../../src/net/protocol.ts'
import { WITHOUT_ROOT } from './namespaces.ts'

/**
 * Of the million that it allows. The program needed 24,382 when this was written; much more than
 * that is a loop whose paths multiply.
 */
const VERIFIED_MAX = 40_000

const committed = new URL('../../bpf/', import.meta.url)
const noClang = canCompile() ? false : `SKIPPED: ${CLANG} is not installed`

test('a committed object is not what its source compiles to', { skip: noClang }, (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'lattice-objects-'))
  t.after(() => rmSync(folder, { recursive: true }))
  const names = compile(folder)
  assert.deepEqual(names, globSync('*.o', { cwd: committed }).toSorted())
  for (const name of names) {
    const [now, then] = [readFileSync(join(folder, name)), readFileSync(new URL(name, committed))]
    assert.ok(now.equals(then), `bpf/${name} is out of date: node tools/bpf.ts`)
  }
})

const lacking = cannotLink()
const noLinker = lacking === undefined ? false : `SKIPPED: ${lacking} is not installed`

test('the native ring is not what its source compiles to', { skip: noLinker }, (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'lattice-objects-'))
  t.after(() => rmSync(folder, { recursive: true }))
  compileNative(folder)
  const then = readFileSync(new URL(`../../native/${OBJECT}`, import.meta.url))
  const isSame = readFileSync(join(folder, OBJECT)).equals(then)
  assert.ok(isSame, `native/${OBJECT} is out of date: node tools/native.ts`)
})

test('the verifier has too much to follow', { skip: WITHOUT_ROOT }, (t) => {
  const ingress = Ingress.load()
  t.after(() => ingress.close())
  const { verified, machineBytes } = ingress.program.info()
  t.diagnostic(`${verified} instructions verified, ${machineBytes} bytes of machine code`)
  assert.ok(verified > 1000 && verified < VERIFIED_MAX, `${verified}`)
})

test('our layout is not the program’s', { skip: WITHOUT_ROOT }, (t) => {
  const object = new BpfObject(readFileSync(new URL('ingress.o', committed)))
  t.after(() => object.close())
  const map = (name: string) => object.map(name)
  assert.equal(map('tenants').valueBytes, TENANT.bytes)
  assert.equal(map('tenants').entries, TENANTS_MAX)
  assert.equal(map('tenant_uses').valueBytes, TENANT_USE.bytes)
  assert.equal(map('controls').valueBytes, CONTROL.bytes)
  assert.equal(map('requests').valueBytes, BUCKET.bytes)
  assert.equal(BUCKET.requests + BUCKET.slots * REQUEST.bytes, BUCKET.bytes)
})
