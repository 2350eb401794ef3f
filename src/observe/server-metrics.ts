// Owns the list of metrics that the server exports: names, meanings, buckets. docs/metrics.md
// documents each; a test keeps the two equal. Meanings follow vLLM's metrics of the same name.

import type { EngineSnapshot } from '../engine/api.ts'
import { Registry } from './prometheus.ts'

// Bounds from half a millisecond to minutes: a small model's first token and a long answer's last
// fall inside, with at most a factor of 2.5 between neighbours.
const INTERVAL_SECONDS = [
  0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5,
]
const FIRST_TOKEN_SECONDS = [
  0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120,
]
const REQUEST_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600]
const TOKENS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000]
const CHOICES = [1, 2, 5, 10, 20, 50, 128]

/** Why the server, not the model, ended a request's generation. */
export type AbortCause = 'disconnect' | 'slow_reader' | 'error'

export class ServerMetrics {
  readonly registry = new Registry()
  readonly #r = this.registry

  readonly #running = this.#r.gauge('lattice_num_requests_running', 'Sequences that hold a slot.')
  readonly #waiting = this.#r.gauge('lattice_num_requests_waiting', 'Sequences in the queue.')
  readonly #kvUsage = this.#r.gauge(
    'lattice_kv_cache_usage_perc',
    'KV pages in use as a fraction of the limit; 1 is full.',
  )
  readonly #kvPageBytes = this.#r.gauge('lattice_kv_page_bytes', 'Size of one KV page.')
  readonly #kvUsedPages = this.#r.gauge('lattice_kv_used_pages', 'KV pages in use.')
  readonly #kvLimitPages = this.#r.gauge('lattice_kv_limit_pages', 'KV pages that may be in use.')
  readonly #kvResident = this.#r.gauge(
    'lattice_kv_resident_bytes',
    'KV memory that the kernel holds resident.',
  )
  readonly #engineUp = this.#r.gauge('lattice_engine_up', '1 while the engine answers, else 0.')
  readonly #preemptions = this.#r.counter(
    'lattice_num_preemptions_total',
    'Sequences that made room, by how they come back: offload or recompute.',
    ['how'],
  )
  readonly #offloadBytes = this.#r.gauge('lattice_kv_offload_bytes', 'KV outside of memory.')
  readonly #offloadLimit = this.#r.gauge(
    'lattice_kv_offload_limit_bytes',
    'KV that may be outside of memory.',
  )
  readonly #offloadLevel = this.#r.gauge(
    'lattice_kv_offload_level_bytes',
    "KV of a GPU that lies outside of its memory, by level: in the host's, or on disk.",
    ['level'],
  )
  readonly #offloadMoved = this.#r.counter(
    'lattice_kv_offload_moved_bytes_total',
    'KV written to outside of memory (out) and read back (in).',
    ['direction'],
  )
  readonly #faults = this.#r.counter(
    'lattice_kv_faults_total',
    'Touches of KV pages that were on their way from disk.',
  )
  readonly #kept = this.#r.gauge(
    'lattice_kv_store_prefixes',
    'Cached prefixes that would outlive the process.',
  )
  readonly #offloadLost = this.#r.counter(
    'lattice_kv_offload_lost_total',
    'Sequences and prefixes whose KV could not be written or read back.',
  )
  readonly #beamCopies = this.#r.counter(
    'lattice_beam_copies_total',
    'Forks of beams that were copied in part, because their tokens lay in too many places.',
  )
  readonly #prefixQueries = this.#r.counter(
    'lattice_prefix_cache_queries_total',
    'Prompt tokens looked up in the prefix cache.',
  )
  readonly #prefixHits = this.#r.counter(
    'lattice_prefix_cache_hits_total',
    'Prompt tokens found in the prefix cache.',
  )
  readonly #prefixEvictions = this.#r.counter(
    'lattice_prefix_cache_evictions_total',
    'Ends of cached prefixes that were forgotten to make room.',
  )
  readonly #prefixPages = this.#r.gauge(
    'lattice_prefix_cache_pages',
    'KV pages that cached prefixes refer to, pinned ones included.',
  )
  readonly #promptTokens = this.#r.counter('lattice_prompt_tokens_total', 'Prompt tokens computed.')
  readonly #generationTokens = this.#r.counter(
    'lattice_generation_tokens_total',
    'Output tokens generated.',
  )
  readonly #steps = this.#r.counter('lattice_engine_steps_total', 'Engine steps run.')
  readonly #stepSeconds = this.#r.counter(
    'lattice_engine_step_seconds_total',
    'Wall time spent in engine steps.',
  )
  readonly #computeSeconds = this.#r.counter(
    'lattice_engine_compute_seconds_total',
    "Wall time spent in the backend's compute, a part of the steps' time.",
  )

  readonly requestQueueTime = this.#r.histogram(
    'lattice_request_queue_time_seconds',
    'From submission to the engine to leaving its queue, per choice.',
    FIRST_TOKEN_SECONDS,
  )
  readonly timeToFirstToken = this.#r.histogram(
    'lattice_time_to_first_token_seconds',
    "From a request's arrival to its first output token, per choice.",
    FIRST_TOKEN_SECONDS,
  )
  readonly interTokenLatency = this.#r.histogram(
    'lattice_inter_token_latency_seconds',
    'Between one output token of a choice and the next.',
    INTERVAL_SECONDS,
  )
  readonly timePerOutputToken = this.#r.histogram(
    'lattice_request_time_per_output_token_seconds',
    'Mean time between output tokens after the first, one observation per choice.',
    INTERVAL_SECONDS,
  )
  readonly requestLatency = this.#r.histogram(
    'lattice_e2e_request_latency_seconds',
    "From a request's arrival to its last output token, per choice.",
    REQUEST_SECONDS,
  )
  readonly requestPromptTokens = this.#r.histogram(
    'lattice_request_prompt_tokens',
    'Prompt tokens per prompt.',
    TOKENS,
  )
  readonly requestGenerationTokens = this.#r.histogram(
    'lattice_request_generation_tokens',
    'Output tokens per choice.',
    TOKENS,
  )
  readonly requestMaxTokens = this.#r.histogram(
    'lattice_request_params_max_tokens',
    'Output tokens at most, per request, after defaults.',
    TOKENS,
  )
  readonly requestChoices = this.#r.histogram(
    'lattice_request_params_n',
    'The parameter n, per request.',
    CHOICES,
  )
  readonly requestSuccess = this.#r.counter(
    'lattice_request_success_total',
    'Choices that ended, by reason: stop, length, abort or error.',
    ['finished_reason'],
  )
  readonly requestAborts = this.#r.counter(
    'lattice_request_aborts_total',
    'Requests the server ended early, by cause: disconnect, slow_reader or error.',
    ['cause'],
  )
  readonly httpRequests = this.#r.counter(
    'lattice_http_requests_total',
    'HTTP requests answered, by route, method and status.',
    ['path', 'method', 'status'],
  )
  readonly httpInFlight = this.#r.gauge(
    'lattice_http_requests_in_flight',
    'HTTP requests whose answer has not begun.',
  )

  readonly #resident = this.#r.gauge(
    'lattice_process_resident_memory_bytes',
    'Resident memory of the process.',
  )
  readonly #cpuSeconds = this.#r.counter(
    'lattice_process_cpu_seconds_total',
    'User and system CPU time of the process.',
  )
  readonly #startTime = this.#r.gauge(
    'lattice_process_start_time_seconds',
    'When the process started, in Unix time.',
  )

  constructor() {
    for (const reason of ['stop', 'length', 'abort', 'error']) this.requestSuccess.add(0, [reason])
    for (const cause of ['disconnect', 'slow_reader', 'error']) this.requestAborts.add(0, [cause])
    this.#startTime.set(Math.round(performance.timeOrigin) / 1000)
  }

  /** The exposition; without a snapshot the engine's own numbers keep their last values. */
  text(snapshot: EngineSnapshot | undefined): string {
    this.#engineUp.set(snapshot ? 1 : 0)
    if (snapshot) this.#take(snapshot)
    this.#resident.set(process.memoryUsage.rss())
    const cpu = process.cpuUsage()
    this.#cpuSeconds.set((cpu.user + cpu.system) / 1e6)
    return this.registry.text()
  }

  #take(snapshot: EngineSnapshot): void {
    const { kv } = snapshot
    this.#running.set(snapshot.running)
    this.#waiting.set(snapshot.waiting)
    this.#kvUsage.set(kv.limitPages > 0 ? kv.usedPages / kv.limitPages : 0)
    this.#kvPageBytes.set(kv.pageBytes)
    this.#kvUsedPages.set(kv.usedPages)
    this.#kvLimitPages.set(kv.limitPages)
    this.#kvResident.set(kv.residentBytes)
    const { tier } = snapshot
    this.#preemptions.set(tier?.offloads ?? 0, ['offload'])
    this.#preemptions.set(snapshot.preemptions - (tier?.offloads ?? 0), ['recompute'])
    this.#offloadBytes.set(tier?.usedBytes ?? 0)
    this.#offloadLimit.set(tier?.capacityBytes ?? 0)
    this.#offloadLevel.set(tier?.levels?.hostUsedBytes ?? 0, ['host'])
    this.#offloadLevel.set(tier?.levels?.diskUsedBytes ?? 0, ['disk'])
    this.#offloadMoved.set(tier?.savedBytes ?? 0, ['out'])
    this.#offloadMoved.set(tier?.loadedBytes ?? 0, ['in'])
    this.#offloadLost.set(tier?.lost ?? 0)
    this.#beamCopies.set(snapshot.beamCopies)
    this.#faults.set(tier?.faults ?? 0)
    this.#kept.set(tier?.kept ?? 0)
    this.#prefixQueries.set(snapshot.prefixQueries)
    this.#prefixHits.set(snapshot.prefixHits)
    this.#prefixEvictions.set(snapshot.prefixEvictions)
    this.#prefixPages.set(kv.cachedPages)
    this.#promptTokens.set(snapshot.promptTokens)
    this.#generationTokens.set(snapshot.outputTokens)
    this.#steps.set(snapshot.steps)
    this.#stepSeconds.set(snapshot.stepMs / 1000)
    this.#computeSeconds.set(snapshot.computeMs / 1000)
  }
}
