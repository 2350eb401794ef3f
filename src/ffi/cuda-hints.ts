// Owns what is said about the driver's error codes.

/** What a user can do about CUDA's codes; of what is not here, only the name is known. */
export const HINTS: Readonly<Record<number, string>> = {
  2: 'The GPU is out of memory: lower --kv-memory or end what else uses it (see nvidia-smi).',
  3: "The driver is shutting down: something ended the process's GPU context.",
  46: 'Another process has the GPU to itself (compute mode): see nvidia-smi.',
  100: 'The driver sees no GPU: check `nvidia-smi` and CUDA_VISIBLE_DEVICES.',
  101: 'Choose a device that `lattice inspect gpu` lists.',
  209: 'The kernel was compiled for another GPU: empty the kernel cache and start again.',
  214: 'The GPU found a memory error it could not correct: it needs a reset or repair.',
  218: 'The driver is too old for this CUDA toolkit: update the driver.',
  222: 'The driver is too old for this CUDA toolkit: update the driver.',
  700: 'A kernel touched memory that is not mapped. Restart; if it comes back, report it.',
  702: 'A kernel ran longer than the GPU allows while it drives a display.',
  719: 'A kernel crashed. Restart; if it comes back, report it.',
  800: 'The system forbids it: check permissions of /dev/nvidia* and the container.',
  802: 'The GPU is not ready: on NVSwitch machines start nvidia-fabricmanager.',
  803: 'Kernel module and driver library differ: reboot, or match the container to the host.',
  804: 'The compatibility library does not support this GPU: update the driver.',
}
