// The devices: H200s by their properties, as many as STANDIN_DEVICES says (one by default).
#include "standin.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define KIB (1 << 10)
#define SMS 132
#define SHARED_BLOCK (48 * KIB)
#define SHARED_OPTIN (227 * KIB)
#define SHARED_SM (228 * KIB)
#define L2 (50 << 20)
#define MEMORY ((size_t)141 << 30)

static __thread int device = 0;

static int count(void) {
  const char *text = getenv("STANDIN_DEVICES");
  int asked = text ? atoi(text) : 1;
  return asked < 1 ? 1 : asked > MAX_DEVICES ? MAX_DEVICES : asked;
}

int current_device(void) {
  return device;
}

size_t device_memory(void) {
  return MEMORY;
}

static int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return SHARED_BLOCK;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return SHARED_OPTIN;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return SHARED_SM;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return SMS;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: return 1;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return L2;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 1;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    default: return 0;
  }
}

// ------------------------------------------------------------------------------------------------- runtime

API cudaError_t cudaGetDeviceCount(int *number) {
  *number = count();
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int *number) {
  *number = device;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int number) {
  if (number < 0 || number >= count()) return cudaErrorInvalidDevice;
  device = number;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) {
  *can = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int number) {
  snprintf(text, size, "0000:%02x:00.0", number);
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int number) {
  *value = attribute((int)which);
  return cudaSuccess;
}

static cudaError_t properties(struct cudaDeviceProp *p, int number) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 (stand-in)");
  memset(p->uuid.bytes, number + 1, sizeof p->uuid.bytes);
  p->totalGlobalMem = MEMORY;
  p->major = 9;
  p->pciBusID = number;
  p->multiProcessorCount = SMS;
  p->regsPerMultiprocessor = p->regsPerBlock = 65536;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsPerBlock = 1024;
  p->warpSize = 32;
  p->sharedMemPerBlock = SHARED_BLOCK;
  p->sharedMemPerBlockOptin = SHARED_OPTIN;
  p->sharedMemPerMultiprocessor = SHARED_SM;
  p->l2CacheSize = L2;
  p->memoryBusWidth = 5120;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
  p->cooperativeLaunch = p->canMapHostMemory = 1;
  p->textureAlignment = 512;
  p->asyncEngineCount = 3;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int number) {
  return properties(p, number);
}
#else
API cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int number) {
  return properties(p, number);
}
#endif

API cudaError_t cudaGetLastError(void) {
  return last_error(1);
}
API cudaError_t cudaPeekAtLastError(void) {
  return last_error(0);
}
API const char *cudaGetErrorName(cudaError_t error) {
  return "stand-in error";
}
API const char *cudaGetErrorString(cudaError_t error) {
  static __thread char text[64];
  snprintf(text, sizeof text, "stand-in CUDA error %d", error);
  return text;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                 unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API cudaError_t cudaProfilerStart(void) {
  LOCKED;
  write_record("profiler", "start", NULL, "%s", "");
  return cudaSuccess;
}
API cudaError_t cudaProfilerStop(void) {
  LOCKED;
  write_record("profiler", "stop", NULL, "%s", "");
  return cudaSuccess;
}

// -------------------------------------------------------------------------------------------------- driver

API CUresult cuInit(unsigned flags) {
  return CUDA_SUCCESS;
}
API CUresult cuDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int *number) {
  *number = count();
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice *found, int number) {
  *found = number;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice number) {
  *value = attribute((int)which);
  return CUDA_SUCCESS;
}
// A context is its device's number plus one.
API CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)(size_t)(device + 1);
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) device = (int)(size_t)context - 1;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice *number) {
  *number = device;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice number) {
  *context = (CUcontext)(size_t)(number + 1);
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice number, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "stand-in driver error";
  return CUDA_SUCCESS;
}
// By number: the header renames the function to its latest version.
CUresult entry_point(const char *name, void **function) __asm__("cuGetProcAddress_v2") API;
CUresult entry_point(const char *name, void **function) {
  *function = dlsym(RTLD_DEFAULT, name);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
