// A CUDA device without hardware: the parts that its C files share.
//
// The library is preloaded before PyTorch. It takes the place of the CUDA runtime (cuda*), of the driver (cu*), of
// cuBLAS (cublas*) and of NCCL (nccl*). Device memory is host memory. Kernels compute nothing. Copies between host
// and device are real. Streams, events and captures follow CUDA's rules of capture, and a breach is a violation.
#pragma once
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stddef.h>
#include <stdarg.h>
#include <stdio.h>

#define API __attribute__((visibility("default")))
#define MAX_DEVICES 8
#define MAX_MEMBERS 16

// The nodes of one graph.
typedef struct {
  int id;
  long kernels, copies, memsets, hosts;
} Graph;

// A capture under way. members: the streams that take part, the origin first.
typedef struct Capture {
  Graph *graph;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  int invalid, count;
  struct Stream *members[MAX_MEMBERS];
  struct Capture *next;
} Capture;

// A vector clock: for each member of a capture, how much of its work lies before this point.
typedef struct {
  long work[MAX_MEMBERS];
} Clock;

// capture: the one that the stream takes part in, as its member number `place`; NULL outside of a capture.
typedef struct Stream {
  int id, device, place;
  Capture *capture;
  Clock clock;
} Stream;

// recorded: whether it was ever recorded. capture, clock: where in a capture. launched: graph launches before it.
typedef struct {
  int id, timing, recorded, capture_id;
  Clock clock;
  long launched;
} Event;

// One allocation. host: pinned host memory, else memory of `device`.
typedef struct {
  char *base;
  size_t size;
  int host, device;
} Allocation;

// A function of a loaded cubin. params: how many parameters; sizes: their bytes; -1 parameters: unknown.
#define MAX_PARAMS 128
typedef struct {
  char name[512];
  int params;
  unsigned short sizes[MAX_PARAMS];
} Function;

// ---- log.c
// Writes one record. more: further JSON members with a leading comma, printf-formatted, or "".
void write_record(const char *kind, const char *name, const Stream *stream, const char *more, ...)
    __attribute__((format(printf, 4, 5)));
int log_is_open(void);
// Counts and logs a breach of the rules, keeps `error` as the thread's last error and returns it.
cudaError_t violation(cudaError_t error, const char *text, ...) __attribute__((format(printf, 2, 3)));
// The same for a function that the library does not model.
cudaError_t unmodelled(const char *function);
cudaError_t last_error(int clear);

// ---- memory.c
Allocation *find_allocation(const void *pointer);
void *allocate(size_t size, int host);

// ---- streams.c
extern pthread_mutex_t lock;
Stream *stream_of(void *handle);
// Refuses a call that CUDA calls unsafe while a capture is under way that concerns this thread.
cudaError_t unsafe(const char *function);
// A piece of work given to a stream: a node where it is captured. kind: kernel, memcpy, memset or host.
cudaError_t enqueue(const char *kind, const char *name, void *stream, const char *more, ...)
    __attribute__((format(printf, 4, 5)));
long graph_launches(void);
void count_graph_launch(void);
Graph *end_capture(Stream *stream, cudaError_t *error);

// ---- device.c
int current_device(void);
size_t device_memory(void);

// ---- cubin.c
// Reads how many parameters a kernel of a cubin takes, and their sizes.
void read_parameters(const void *image, Function *function);

#define LOCKED __attribute__((cleanup(unlock))) int locked = take_lock()
static inline int take_lock(void) {
  pthread_mutex_lock(&lock);
  return 1;
}
static inline void unlock(int *locked) {
  if (*locked) pthread_mutex_unlock(&lock);
}
