// Owns the small HTTP helpers of tests: JSON in, status and JSON out, events of a stream.

export interface Answer {
  status: number
  headers: Headers
  // A test reads any shape and its assertions check it.
  // oxlint-disable-next-line typescript/no-explicit-any
  json: any
}

type Fetch = (path: string, init: RequestInit) => Response | Promise<Response>

/** Posts `body` as JSON (a string as it is). */
export async function post(
  fetch: Fetch,
  path: string,
  body: unknown,
  headers: Record<string, string> = {},
): Promise<Answer> {
  const response = await fetch(path, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
    body: typeof body === 'string' ? body : JSON.stringify(body),
  })
  const text = await response.text()
  return { status: response.status, headers: response.headers, json: JSON.parse(text) }
}

/** Posts and gives each event's data, parsed unless it is [DONE]. */
export async function postStream(fetch: Fetch, path: string, body: object): Promise<any[]> {
  const response = await fetch(path, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ ...body, stream: true }),
  })
  return events(await response.text())
}

/** The data of each event in a whole event stream. */
export function events(text: string): any[] {
  return text
    .split('\n\n')
    .filter((frame) => frame !== '')
    .map((frame) => {
      if (!frame.startsWith('data: ')) throw new Error(`not a data frame: ${frame}`)
      const data = frame.slice('data: '.length)
      return data === '[DONE]' ? data : JSON.parse(data)
    })
}

export function over(url: string): Fetch {
  return (path, init) => fetch(`${url}${path}`, init)
}

/** Waits until `holds`, and says what it waited for if it never does. */
export async function until(what: string, holds: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = performance.now() + 5000
  while (!(await holds())) {
    if (performance.now() > deadline) throw new Error(`never happened: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 2))
  }
}
