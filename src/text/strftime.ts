// Owns dates in chat templates, written as Python's strftime does in the C locale.

const DAYS = ['Sunday', 'Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday']
const MONTHS = [
  'January',
  'February',
  'March',
  'April',
  'May',
  'June',
  'July',
  'August',
  'September',
  'October',
  'November',
  'December',
]

/**
 * Formats local time. Knows %a %A %b %B %d %e %H %I %j %m %M %p %S %y %Y %F %T and %%, each with
 * the `-` that drops padding.
 *
 * @throws Error for another directive: to leave it as it is would be a wrong date
 */
export function strftime(date: Date, format: string): string {
  return format.replace(/%(-?)(.)/gs, (_, dash: string, directive: string) => {
    const written = write(date, directive)
    if (written === undefined) throw new Error(`strftime directive %${dash}${directive}`)
    return dash === '-' ? written.replace(/^[0 ]+(?=\d)/, '') : written
  })
}

function write(date: Date, directive: string): string | undefined {
  const two = (value: number): string => String(value).padStart(2, '0')
  switch (directive) {
    case 'a':
      return DAYS[date.getDay()]!.slice(0, 3)
    case 'A':
      return DAYS[date.getDay()]
    case 'b':
      return MONTHS[date.getMonth()]!.slice(0, 3)
    case 'B':
      return MONTHS[date.getMonth()]
    case 'd':
      return two(date.getDate())
    case 'e':
      return String(date.getDate()).padStart(2, ' ')
    case 'H':
      return two(date.getHours())
    case 'I':
      return two(date.getHours() % 12 || 12)
    case 'j':
      return String(dayOfYear(date)).padStart(3, '0')
    case 'm':
      return two(date.getMonth() + 1)
    case 'M':
      return two(date.getMinutes())
    case 'p':
      return date.getHours() < 12 ? 'AM' : 'PM'
    case 'S':
      return two(date.getSeconds())
    case 'y':
      return two(date.getFullYear() % 100)
    case 'Y':
      return String(date.getFullYear())
    case 'F':
      return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`
    case 'T':
      return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`
    case '%':
      return '%'
    default:
      return undefined
  }
}

function dayOfYear(date: Date): number {
  const midnight = Date.UTC(date.getFullYear(), date.getMonth(), date.getDate())
  return Math.round((midnight - Date.UTC(date.getFullYear(), 0, 0)) / 86_400_000)
}
