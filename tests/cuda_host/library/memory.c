// Memory of devices and pinned memory: mapped without being touched. Copies, and fills up to a size.
#include "standin.h"

#include <string.h>
#include <sys/mman.h>

#define MAX_ALLOCATIONS 65536
// Larger copies between device buffers move nothing, so that untouched memory takes none of the host's.
#define LARGEST_REAL_COPY (1 << 16)

static Allocation allocations[MAX_ALLOCATIONS];
static int highest = 0;
static size_t used[MAX_DEVICES];

Allocation *find_allocation(const void *pointer) {
  const char *at = pointer;
  for (int i = highest - 1; i >= 0; i--) {
    Allocation *found = &allocations[i];
    if (found->base && at >= found->base && at < found->base + found->size) return found;
  }
  return NULL;
}

static size_t in_pages(size_t size) {
  return size ? (size + 4095) / 4096 * 4096 : 4096;
}

void *allocate(size_t size, int host) {
  size_t bytes = in_pages(size);
  int device = current_device();
  if (!host && used[device] + bytes > device_memory()) return NULL;
  void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return NULL;
  int i = 0;
  while (i < highest && allocations[i].base) i++;
  if (i == MAX_ALLOCATIONS) return NULL;
  if (i == highest) highest++;
  allocations[i] = (Allocation){base, bytes, host, device};
  if (!host) used[device] += bytes;
  return base;
}

static void release(void *pointer) {
  Allocation *found = find_allocation(pointer);
  if (!found) return;
  if (!found->host) used[found->device] -= found->size;
  munmap(found->base, found->size);
  found->base = NULL;
}

// ------------------------------------------------------------------------------------- allocation and facts

static cudaError_t take(void **pointer, size_t size, int host, const char *function) {
  LOCKED;
  cudaError_t error = unsafe(function);
  if (error) return error;
  *pointer = allocate(size, host);
  write_record("malloc", host ? "pinned" : "device", NULL, ",\"bytes\":%zu", size);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

static cudaError_t give_back(void *pointer, const char *name, const char *function) {
  LOCKED;
  if (!pointer) return cudaSuccess;
  cudaError_t error = unsafe(function);
  if (error) return error;
  release(pointer);
  write_record("free", name, NULL, "%s", "");
  return cudaSuccess;
}

API cudaError_t cudaMalloc(void **pointer, size_t size) {
  return take(pointer, size, 0, "cudaMalloc");
}
API cudaError_t cudaFree(void *pointer) {
  return give_back(pointer, "device", "cudaFree");
}
API cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  return take(pointer, size, 1, "cudaHostAlloc");
}
API cudaError_t cudaFreeHost(void *pointer) {
  return give_back(pointer, "pinned", "cudaFreeHost");
}
API cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
  return unsafe("cudaHostRegister");
}
API cudaError_t cudaHostUnregister(void *pointer) {
  return unsafe("cudaHostUnregister");
}

API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  LOCKED;
  *total = device_memory();
  *free = *total - used[current_device()];
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  LOCKED;
  memset(attributes, 0, sizeof *attributes);
  Allocation *found = find_allocation(pointer);
  attributes->type = !found         ? cudaMemoryTypeUnregistered
                     : found->host ? cudaMemoryTypeHost
                                   : cudaMemoryTypeDevice;
  attributes->device = found ? found->device : 0;
  attributes->devicePointer = attributes->hostPointer = (void *)pointer;
  return cudaSuccess;
}

API cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
  LOCKED;
  *pointer = allocate(4096, 0);
  return cudaSuccess;
}

// -------------------------------------------------------------------------------------------------- copies

static const char *place(const Allocation *allocation) {
  return !allocation ? "pageable" : allocation->host ? "pinned" : "device";
}

static void move(void *target, const void *source, size_t size) {
  Allocation *to = find_allocation(target), *from = find_allocation(source);
  int within_devices = to && !to->host && from && !from->host;
  if (!within_devices || size <= LARGEST_REAL_COPY) memmove(target, source, size);
}

static cudaError_t copy_now(void *target, const void *source, size_t size, const char *function) {
  LOCKED;
  cudaError_t error = unsafe(function);
  if (error) return error;
  move(target, source, size);
  write_record("sync", function, NULL, ",\"bytes\":%zu", size);
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
  return copy_now(target, source, size, "cudaMemcpy");
}
API cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *source, size_t size, size_t offset,
                                   enum cudaMemcpyKind kind) {
  return unsafe("cudaMemcpyToSymbol");
}

API cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, enum cudaMemcpyKind kind,
                                cudaStream_t handle) {
  LOCKED;
  const char *from = place(find_allocation(source)), *to = place(find_allocation(target));
  Stream *stream = stream_of(handle);
  if (stream->capture && (from[1] == 'a' || to[1] == 'a'))
    return violation(cudaErrorStreamCaptureUnsupported, "a capture copies %zu bytes from %s to %s memory", size, from,
                     to);
  // A capture records the copy and does not make it.
  if (!stream->capture) move(target, source, size);
  return enqueue("memcpy", "cudaMemcpyAsync", handle, ",\"bytes\":%zu,\"from\":\"%s\",\"to\":\"%s\"", size, from, to);
}

API cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch,
                                  size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  LOCKED;
  const char *from = place(find_allocation(source)), *to = place(find_allocation(target));
  return enqueue("memcpy", "cudaMemcpy2DAsync", stream, ",\"bytes\":%zu,\"from\":\"%s\",\"to\":\"%s\"",
                 width * height, from, to);
}

API cudaError_t cudaMemcpyPeerAsync(void *target, int to, const void *source, int from, size_t size,
                                    cudaStream_t stream) {
  LOCKED;
  return enqueue("memcpy", "cudaMemcpyPeerAsync", stream, ",\"bytes\":%zu,\"from\":\"device\",\"to\":\"device\"",
                 size);
}

API cudaError_t cudaMemset(void *target, int value, size_t size) {
  LOCKED;
  cudaError_t error = unsafe("cudaMemset");
  if (!error && size <= LARGEST_REAL_COPY) memset(target, value, size);
  return error;
}

API cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t handle) {
  LOCKED;
  if (!stream_of(handle)->capture && size <= LARGEST_REAL_COPY) memset(target, value, size);
  return enqueue("memset", "cudaMemsetAsync", handle, ",\"bytes\":%zu", size);
}
