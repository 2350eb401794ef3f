// Owns a binary heap whose items know their place, so that one can change or leave in O(log n).

import { present } from '../assert.ts'

export interface HeapItem {
  /** The lowest is first. */
  value: number
  /** Among equal values, the lowest is first. */
  usedAt: number
  /** The heap's to set; -1 while the item is in none. */
  heapIndex: number
}

export class MinHeap<T extends HeapItem> {
  readonly items: T[] = []

  get first(): T | undefined {
    return this.items[0]
  }

  add(item: T): void {
    this.items.push(item)
    this.rise(item, this.items.length - 1)
  }

  remove(item: T): void {
    const at = item.heapIndex
    const last = present(this.items.pop(), 'an item of the heap')
    item.heapIndex = -1
    if (last === item) return
    this.rise(last, at)
    this.sink(last, last.heapIndex)
  }

  /** The item's value has changed. */
  moved(item: T): void {
    this.rise(item, item.heapIndex)
    this.sink(item, item.heapIndex)
  }

  private rise(item: T, from: number): void {
    let at = from
    while (at > 0) {
      const parent = present(this.items[(at - 1) >> 1], 'a parent')
      if (!before(item, parent)) break
      this.put(parent, at)
      at = (at - 1) >> 1
    }
    this.put(item, at)
  }

  private sink(item: T, from: number): void {
    let at = from
    for (;;) {
      const left = this.items[2 * at + 1]
      const right = this.items[2 * at + 2]
      const child = left && right && before(right, left) ? right : left
      if (!child || !before(child, item)) break
      const next = child.heapIndex
      this.put(child, at)
      at = next
    }
    this.put(item, at)
  }

  private put(item: T, at: number): void {
    this.items[at] = item
    item.heapIndex = at
  }
}

/** Whether a comes before b. */
export function before(a: HeapItem, b: HeapItem): boolean {
  return a.value < b.value || (a.value === b.value && a.usedAt < b.usedAt)
}
