// Kernels of the runtime: those that PyTorch's own libraries bring along and launch.
#include "standin.h"

#include <stdlib.h>
#include <string.h>

// A hash table from a kernel's host address to its name, open addressing.
#define SLOTS (1 << 18)
static struct {
  const void *function;
  const char *name;
} kernels[SLOTS];
static int registered = 0;

static unsigned slot_of(const void *function) {
  unsigned slot = ((unsigned)((size_t)function >> 4) * 2654435761u) >> 14;
  while (kernels[slot].function && kernels[slot].function != function) slot = (slot + 1) % SLOTS;
  return slot;
}

API void **__cudaRegisterFatBinary(void *binary) {
  return malloc(sizeof(void *));
}
API void __cudaRegisterFatBinaryEnd(void **handle) {}
API void __cudaUnregisterFatBinary(void **handle) {}
API char __cudaInitModule(void **handle) {
  return 1;
}
API void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                           int constant, int global) {}
API void __cudaRegisterFunction(void **handle, const char *function, char *device, const char *name, int limit,
                                void *thread, void *block, void *block_dim, void *grid_dim, int *warp_size) {
  LOCKED;
  if (++registered > SLOTS / 2) abort();
  unsigned slot = slot_of(function);
  kernels[slot].function = function;
  kernels[slot].name = name;
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} configuration;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void **)stream = configuration.stream;
  return cudaSuccess;
}

static cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared, void *stream) {
  const char *known = kernels[slot_of(function)].name, *name = known ? known : "unknown";
  if (!grid.x || !grid.y || !grid.z) return violation(cudaErrorInvalidConfiguration, "%s has an empty grid", name);
  return enqueue("kernel", name, stream, ",\"source\":\"aten\",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"shared\":%zu",
                 grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
}

API cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **args, size_t shared,
                                 cudaStream_t stream) {
  return launch(function, grid, block, shared, stream);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args, size_t shared,
                                   cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **args, size_t shared,
                                            cudaStream_t stream) {
  return launch(function, grid, block, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **args) {
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 227 << 10;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                              size_t shared) {
  *blocks = 2048 / (threads ? threads : 1);
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                       size_t shared, unsigned flags) {
  *blocks = 2048 / (threads ? threads : 1);
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------- unmodelled
// Imported by PyTorch and not needed so far. Declared without parameters, under the same names.

#define UNMODELLED(function)                                     \
  cudaError_t unmodelled_##function(void) __asm__(#function) API; \
  cudaError_t unmodelled_##function(void) {                      \
    return unmodelled(#function);                                \
  }
UNMODELLED(cudaDeviceEnablePeerAccess)
UNMODELLED(cudaDeviceGetDefaultMemPool)
UNMODELLED(cudaDeviceGetGraphMemAttribute)
UNMODELLED(cudaDeviceSetGraphMemAttribute)
UNMODELLED(cudaFreeAsync)
UNMODELLED(cudaGraphAddNode)
UNMODELLED(cudaGraphConditionalHandleCreate)
UNMODELLED(cudaGraphNodeGetDependencies)
UNMODELLED(cudaIpcCloseMemHandle)
UNMODELLED(cudaIpcGetEventHandle)
UNMODELLED(cudaIpcGetMemHandle)
UNMODELLED(cudaIpcOpenEventHandle)
UNMODELLED(cudaIpcOpenMemHandle)
UNMODELLED(cudaKernelSetAttributeForDevice)
UNMODELLED(cudaLibraryGetKernel)
UNMODELLED(cudaLibraryLoadData)
UNMODELLED(cudaLibraryUnload)
UNMODELLED(cudaMallocAsync)
UNMODELLED(cudaMemPoolGetAttribute)
UNMODELLED(cudaMemPoolSetAccess)
UNMODELLED(cudaMemPoolSetAttribute)
UNMODELLED(cudaMemPoolTrimTo)
UNMODELLED(cudaStreamUpdateCaptureDependencies)
