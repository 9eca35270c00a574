// The driver's side: modules with the cubins that Triton compiles, and the launches of their kernels.
#include "standin.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// A module is its image, kept while it is loaded: Triton may free its own.
typedef struct {
  char *image;
} Module;

API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  LOCKED;
  if (unsafe("cuModuleLoadData")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  Module *loaded = calloc(1, sizeof *loaded);
  // The size of an ELF image: its section headers lie at its end.
  const unsigned char *bytes = image;
  if (!memcmp(bytes, "\x7f" "ELF", 4)) {
    uint64_t sections = *(const uint64_t *)(bytes + 40), programs = *(const uint64_t *)(bytes + 32);
    size_t end = sections + (size_t) * (const uint16_t *)(bytes + 58) * *(const uint16_t *)(bytes + 60);
    size_t other = programs + (size_t) * (const uint16_t *)(bytes + 54) * *(const uint16_t *)(bytes + 56);
    size_t size = end > other ? end : other;
    loaded->image = malloc(size);
    memcpy(loaded->image, image, size);
  }
  write_record("module", "load", NULL, "%s", "");
  *module = (CUmodule)loaded;
  return CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options,
                                void **values) {
  return cuModuleLoadData(module, image);
}
API CUresult cuModuleLoad(CUmodule *module, const char *path) {
  LOCKED;
  FILE *file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  fseek(file, 0, SEEK_END);
  size_t size = ftell(file);
  rewind(file);
  char *image = malloc(size);
  CUresult result = fread(image, 1, size, file) == size ? cuModuleLoadData(module, image) : CUDA_ERROR_INVALID_IMAGE;
  free(image);
  fclose(file);
  return result;
}
API CUresult cuModuleUnload(CUmodule module) {
  free(((Module *)module)->image);
  free((void *)module);
  return CUDA_SUCCESS;
}
API CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module, const char *name) {
  LOCKED;
  Function *function = calloc(1, sizeof *function);
  snprintf(function->name, sizeof function->name, "%s", name);
  function->params = -1;
  if (((Module *)module)->image) read_parameters(((Module *)module)->image, function);
  *handle = (CUfunction)function;
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr pointer) {
  LOCKED;
  Allocation *found = find_allocation((void *)pointer);
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
    if (!found) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)value = pointer;
  } else {
    *(int *)value = found && found->host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
  }
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------------------------ launches

// The parameters as a JSON list of [size, value]; empty text where they are not known.
static void write_parameters(char *text, size_t room, const Function *function, void **params) {
  *text = 0;
  if (!params || function->params < 0) return;
  size_t used = snprintf(text, room, ",\"args\":[");
  for (int i = 0; i < function->params && used + 40 < room; i++) {
    int64_t value = 0;
    unsigned short size = function->sizes[i];
    if (size == 4) {
      int32_t narrow;
      memcpy(&narrow, params[i], sizeof narrow);
      value = narrow;
    } else if (size <= 8) {
      memcpy(&value, params[i], size);
    }
    used += snprintf(text + used, room - used, "%s[%d,%" PRId64 "]", i ? "," : "", size, value);
  }
  snprintf(text + used, room - used, "]");
}

static CUresult launch(CUfunction handle, const unsigned *grid, const unsigned *block, unsigned shared, void *stream,
                       void **params) {
  const Function *function = (Function *)handle;
  if (!grid[0] || !grid[1] || !grid[2]) {
    violation(cudaErrorInvalidConfiguration, "%s has an empty grid", function->name);
    return CUDA_ERROR_INVALID_VALUE;
  }
  char args[4096] = "";
  if (log_is_open()) write_parameters(args, sizeof args, function, params);
  cudaError_t error = enqueue(
      "kernel", function->name, stream,
      ",\"source\":\"triton\",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"shared\":%u%s", grid[0], grid[1], grid[2],
      block[0], block[1], block[2], shared, args);
  return error ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
}

API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **params,
                            void **extra) {
  unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
  return launch(function, grid, block, shared, stream, params);
}
API CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                       unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                       CUstream stream, void **params) {
  unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
  return launch(function, grid, block, shared, stream, params);
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  return launch(function, grid, block, config->sharedMemBytes, config->hStream, params);
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
  *blocks = 2;
  return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 2;
  return CUDA_SUCCESS;
}

// -------------------------------------------------------------------------------------- without any effect

#define WITHOUT_EFFECT(function, result)                       \
  CUresult without_##function(void) __asm__(#function) API;    \
  CUresult without_##function(void) {                          \
    return result;                                             \
  }
WITHOUT_EFFECT(cuTensorMapEncodeTiled, CUDA_SUCCESS)
WITHOUT_EFFECT(cuTensorMapEncodeIm2col, CUDA_SUCCESS)
WITHOUT_EFFECT(cuLinkCreate_v2, CUDA_ERROR_NOT_SUPPORTED)
WITHOUT_EFFECT(cuLinkAddData_v2, CUDA_ERROR_NOT_SUPPORTED)
WITHOUT_EFFECT(cuLinkComplete, CUDA_ERROR_NOT_SUPPORTED)
