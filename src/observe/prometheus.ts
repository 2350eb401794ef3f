// Owns counters, gauges and histograms and their text form (Prometheus exposition format 0.0.4).

/** Label names are fixed per metric; values are given in the same order with each sample. */
type LabelValues = readonly string[]

/** Anything that prints itself into an exposition. */
interface Metric {
  readonly name: string
  readonly help: string
  readonly type: 'counter' | 'gauge' | 'histogram'
  lines(): string[]
}

/** One value for each combination of label values seen so far. */
export class Value implements Metric {
  readonly name: string
  readonly help: string
  readonly type: 'counter' | 'gauge'
  readonly #labelNames: readonly string[]
  readonly #byLabels = new Map<string, number>()

  constructor(
    type: 'counter' | 'gauge',
    name: string,
    help: string,
    labelNames: readonly string[] = [],
  ) {
    this.type = type
    this.name = name
    this.help = help
    this.#labelNames = labelNames
    if (labelNames.length === 0) this.#byLabels.set('', 0)
  }

  add(amount = 1, labels: LabelValues = []): void {
    const key = labelText(this.#labelNames, labels)
    this.#byLabels.set(key, (this.#byLabels.get(key) ?? 0) + amount)
  }

  set(value: number, labels: LabelValues = []): void {
    this.#byLabels.set(labelText(this.#labelNames, labels), value)
  }

  get(labels: LabelValues = []): number {
    return this.#byLabels.get(labelText(this.#labelNames, labels)) ?? 0
  }

  lines(): string[] {
    return [...this.#byLabels].map(([labels, value]) => `${this.name}${labels} ${value}`)
  }
}

/** Counts of observations at or below each bound, their sum and their number. */
export class Histogram implements Metric {
  readonly type = 'histogram'
  readonly name: string
  readonly help: string
  readonly #bounds: readonly number[]
  readonly #counts: Float64Array
  #sum = 0

  /** @param bounds upper bounds, ascending; +Inf is added. */
  constructor(name: string, help: string, bounds: readonly number[]) {
    this.name = name
    this.help = help
    this.#bounds = bounds
    this.#counts = new Float64Array(bounds.length + 1)
  }

  /** Records `value` as seen `times` times. */
  observe(value: number, times = 1): void {
    let bucket = 0
    while (bucket < this.#bounds.length && value > this.#bounds[bucket]!) bucket++
    this.#counts[bucket]! += times
    this.#sum += value * times
  }

  lines(): string[] {
    let total = 0
    const buckets = [...this.#counts].map((count, i) => {
      total += count
      return `${this.name}_bucket{le="${this.#bounds[i] ?? '+Inf'}"} ${total}`
    })
    return [...buckets, `${this.name}_sum ${this.#sum}`, `${this.name}_count ${total}`]
  }
}

/** The metrics of one process, in the order they were made. */
export class Registry {
  readonly #metrics = new Map<string, Metric>()

  counter(name: string, help: string, labelNames: readonly string[] = []): Value {
    return this.#register(new Value('counter', name, help, labelNames))
  }

  gauge(name: string, help: string, labelNames: readonly string[] = []): Value {
    return this.#register(new Value('gauge', name, help, labelNames))
  }

  histogram(name: string, help: string, bounds: readonly number[]): Histogram {
    return this.#register(new Histogram(name, help, bounds))
  }

  /** What is registered, for the test that compares it with the documentation. */
  list(): readonly { name: string; help: string; type: string }[] {
    return [...this.#metrics.values()]
  }

  text(): string {
    let text = ''
    for (const metric of this.#metrics.values()) {
      text += `# HELP ${metric.name} ${metric.help}\n# TYPE ${metric.name} ${metric.type}\n`
      for (const line of metric.lines()) text += `${line}\n`
    }
    return text
  }

  #register<M extends Metric>(metric: M): M {
    if (this.#metrics.has(metric.name)) throw new Error(`metric ${metric.name} is registered twice`)
    this.#metrics.set(metric.name, metric)
    return metric
  }
}

function labelText(names: readonly string[], values: LabelValues): string {
  if (names.length !== values.length) throw new Error(`expected labels ${names.join(', ')}`)
  if (names.length === 0) return ''
  return `{${names.map((name, i) => `${name}="${escapeLabel(values[i]!)}"`).join(',')}}`
}

function escapeLabel(value: string): string {
  return value.replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n')
}
