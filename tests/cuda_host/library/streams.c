// Streams, events and captures, and the rules that CUDA sets for a capture.
#include "standin.h"

#include <stdlib.h>
#include <string.h>

pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static Stream legacy[MAX_DEVICES];
static Capture *captures = NULL;
static int streams = 0, events = 0, graphs = 0;
static long launches = 0;
static __thread enum cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

long graph_launches(void) {
  return launches;
}
void count_graph_launch(void) {
  launches++;
}

Stream *stream_of(void *handle) {
  // NULL and the two special handles: the legacy stream of the current device.
  if ((size_t)handle > 2) return handle;
  Stream *stream = &legacy[current_device()];
  stream->device = current_device();
  return stream;
}

static int is_legacy(const Stream *stream) {
  return stream >= legacy && stream < legacy + MAX_DEVICES;
}

// --------------------------------------------------------------------------------------- rules of a capture

static cudaError_t broken(Capture *capture, cudaError_t error) {
  if (capture) capture->invalid = 1;
  return error;
}

cudaError_t unsafe(const char *function) {
  if (mode_of_thread == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Capture *capture = captures; capture; capture = capture->next) {
    int mine = pthread_equal(capture->thread, pthread_self()) && capture->mode != cudaStreamCaptureModeRelaxed;
    int of_all = capture->mode == cudaStreamCaptureModeGlobal && mode_of_thread == cudaStreamCaptureModeGlobal;
    if (mine || of_all)
      return broken(capture, violation(cudaErrorStreamCaptureUnsupported, "%s during a capture", function));
  }
  return cudaSuccess;
}

// The capture that a call by this thread would run beside.
static Capture *capture_of_thread(void) {
  for (Capture *capture = captures; capture; capture = capture->next)
    if (pthread_equal(capture->thread, pthread_self())) return capture;
  return NULL;
}

static cudaError_t check_outside(const char *kind, const char *name, Stream *stream) {
  if (is_legacy(stream) && captures)
    return broken(captures, violation(cudaErrorStreamCaptureImplicit, "%s %s on the legacy stream during a capture",
                                      kind, name));
  if (capture_of_thread())
    return violation(cudaSuccess, "%s %s on stream %d, which the capture of this thread does not record", kind, name,
                     stream->id);
  return cudaSuccess;
}

static void count_node(Graph *graph, const char *kind) {
  if (!strcmp(kind, "kernel")) graph->kernels++;
  if (!strcmp(kind, "memcpy")) graph->copies++;
  if (!strcmp(kind, "memset")) graph->memsets++;
  if (!strcmp(kind, "host")) graph->hosts++;
}

cudaError_t enqueue(const char *kind, const char *name, void *handle, const char *more, ...) {
  LOCKED;
  Stream *stream = stream_of(handle);
  if (stream->capture) {
    if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
    count_node(stream->capture->graph, kind);
    stream->clock.work[stream->place]++;
  } else {
    cudaError_t error = check_outside(kind, name, stream);
    if (error) return error;
  }
  if (log_is_open()) {
    char members[8192];
    va_list args;
    va_start(args, more);
    vsnprintf(members, sizeof members, more, args);
    va_end(args);
    write_record(kind, name, stream, "%s", members);
  }
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------- streams

static cudaError_t create_stream(cudaStream_t *handle) {
  LOCKED;
  Stream *stream = calloc(1, sizeof *stream);
  stream->id = ++streams;
  stream->device = current_device();
  *handle = (cudaStream_t)stream;
  return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t *handle) {
  return create_stream(handle);
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned flags) {
  return create_stream(handle);
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *handle, unsigned flags, int priority) {
  return create_stream(handle);
}
API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
  *priority = 0;
  return cudaSuccess;
}

API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  LOCKED;
  Stream *stream = stream_of(handle);
  if (stream->capture)
    return broken(stream->capture, violation(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery of a captured stream"));
  return unsafe("cudaStreamQuery");
}

API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  LOCKED;
  Stream *stream = stream_of(handle);
  if (stream->capture)
    return broken(stream->capture,
                  violation(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize of a captured stream"));
  cudaError_t error = unsafe("cudaStreamSynchronize");
  if (!error) write_record("sync", "cudaStreamSynchronize", stream, "%s", "");
  return error;
}

API cudaError_t cudaDeviceSynchronize(void) {
  LOCKED;
  // Every stream of the device is waited for, a captured one too.
  if (captures)
    return broken(captures, violation(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize during a capture"));
  write_record("sync", "cudaDeviceSynchronize", NULL, "%s", "");
  return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function, void *data, unsigned flags) {
  function(handle, cudaSuccess, data);
  return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *data) {
  if (!stream_of(handle)->capture) function(data);
  return enqueue("host", "cudaLaunchHostFunc", handle, "%s", "");
}

// -------------------------------------------------------------------------------------------------- events

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *handle, unsigned flags) {
  LOCKED;
  Event *event = calloc(1, sizeof *event);
  event->id = ++events;
  event->timing = !(flags & cudaEventDisableTiming);
  *handle = (cudaEvent_t)event;
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *handle) {
  return cudaEventCreateWithFlags(handle, 0);
}
API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  LOCKED;
  Event *event = (Event *)handle;
  Stream *stream = stream_of(stream_handle);
  event->recorded = 1;
  event->capture_id = stream->capture ? stream->capture->graph->id : 0;
  event->clock = stream->clock;
  event->launched = launches;
  write_record("event", "record", stream, ",\"event\":%d", event->id);
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}

// An event that was last recorded in a capture marks no point in time.
static cudaError_t check_event(const Event *event, const char *function) {
  if (event->capture_id)
    return violation(cudaErrorCapturedEvent, "%s of event %d, which was recorded in a capture", function, event->id);
  return unsafe(function);
}

API cudaError_t cudaEventQuery(cudaEvent_t event) {
  LOCKED;
  return check_event((Event *)event, "cudaEventQuery");
}

API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  LOCKED;
  Event *event = (Event *)handle;
  cudaError_t error = check_event(event, "cudaEventSynchronize");
  if (!error && event->recorded)
    write_record("sync", "cudaEventSynchronize", NULL, ",\"event\":%d,\"launches_since\":%ld", event->id,
                 launches - event->launched);
  return error;
}

API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t one, cudaEvent_t other) {
  Event *start = (Event *)one, *end = (Event *)other;
  if (start->capture_id || end->capture_id) return check_event(start->capture_id ? start : end, "cudaEventElapsedTime");
  *milliseconds = 50;
  return start->timing && end->timing ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

static Capture *capture_by_id(int id) {
  for (Capture *capture = captures; capture; capture = capture->next)
    if (capture->graph->id == id) return capture;
  return NULL;
}

static void join(Stream *stream, Capture *capture) {
  stream->capture = capture;
  stream->place = capture->count;
  memset(&stream->clock, 0, sizeof stream->clock);
  capture->members[capture->count++] = stream;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
  LOCKED;
  Event *event = (Event *)handle;
  Stream *stream = stream_of(stream_handle);
  Capture *capture = event->capture_id ? capture_by_id(event->capture_id) : NULL;
  write_record("event", "wait", stream, ",\"event\":%d", event->id);
  if (event->capture_id && !capture)
    return violation(cudaErrorCapturedEvent, "stream %d waits for event %d of a capture that has ended", stream->id,
                     event->id);
  if (!capture) {
    if (stream->capture && event->recorded)
      return broken(stream->capture, violation(cudaErrorStreamCaptureIsolation,
                                               "captured stream %d waits for event %d, recorded outside of the capture",
                                               stream->id, event->id));
    return cudaSuccess;
  }
  if (is_legacy(stream))
    return broken(capture, violation(cudaErrorStreamCaptureImplicit, "the legacy stream waits for a captured event"));
  if (stream->capture && stream->capture != capture)
    return broken(capture, violation(cudaErrorStreamCaptureMerge, "an event joins two captures"));
  if (!stream->capture) {
    if (capture->count == MAX_MEMBERS) return violation(cudaErrorStreamCaptureUnsupported, "too many streams");
    join(stream, capture);
  }
  for (int i = 0; i < MAX_MEMBERS; i++)
    if (stream->clock.work[i] < event->clock.work[i]) stream->clock.work[i] = event->clock.work[i];
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------ captures

API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = mode_of_thread;
  mode_of_thread = *mode;
  *mode = before;
  return cudaSuccess;
}

static const char *name_of(enum cudaStreamCaptureMode mode) {
  return mode == cudaStreamCaptureModeGlobal        ? "global"
         : mode == cudaStreamCaptureModeThreadLocal ? "thread_local"
                                                    : "relaxed";
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  LOCKED;
  Stream *stream = stream_of(handle);
  if (is_legacy(stream))
    return violation(cudaErrorStreamCaptureUnsupported, "a capture of the legacy stream begins");
  if (stream->capture)
    return violation(cudaErrorStreamCaptureUnsupported, "a capture begins on a stream that is captured");
  Capture *capture = calloc(1, sizeof *capture);
  capture->graph = calloc(1, sizeof *capture->graph);
  capture->graph->id = ++graphs;
  capture->mode = mode;
  capture->thread = pthread_self();
  capture->next = captures;
  captures = capture;
  join(stream, capture);
  write_record("capture", "begin", stream, ",\"mode\":\"%s\"", name_of(mode));
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                              const cudaGraphNode_t *dependencies, const cudaGraphEdgeData *edges,
                                              size_t count, enum cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(stream, mode);
}

static void unlink_capture(Capture *capture) {
  Capture **at = &captures;
  while (*at != capture) at = &(*at)->next;
  *at = capture->next;
}

Graph *end_capture(Stream *origin, cudaError_t *error) {
  Capture *capture = origin->capture;
  *error = capture->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
  for (int i = 1; i < capture->count; i++)
    if (origin->clock.work[i] < capture->members[i]->clock.work[i])
      *error = violation(cudaErrorStreamCaptureUnjoined, "a capture ends before its origin waits for stream %d",
                         capture->members[i]->id);
  Graph *graph = capture->graph;
  write_record("capture", "end", origin, ",\"kernels\":%ld,\"memcpys\":%ld,\"memsets\":%ld,\"hosts\":%ld,\"streams\":%d",
               graph->kernels, graph->copies, graph->memsets, graph->hosts, capture->count);
  for (int i = 0; i < capture->count; i++) capture->members[i]->capture = NULL;
  unlink_capture(capture);
  free(capture);
  return graph;
}

static enum cudaStreamCaptureStatus status_of(const Stream *stream) {
  return !stream->capture           ? cudaStreamCaptureStatusNone
         : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
  LOCKED;
  *status = status_of(stream_of(handle));
  return cudaSuccess;
}

static cudaError_t capture_info(cudaStream_t handle, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                cudaGraph_t *graph, const cudaGraphNode_t **dependencies, size_t *count) {
  LOCKED;
  Stream *stream = stream_of(handle);
  *status = status_of(stream);
  if (id) *id = stream->capture ? (unsigned long long)stream->capture->graph->id : 0;
  if (graph) *graph = stream->capture ? (cudaGraph_t)stream->capture->graph : NULL;
  if (dependencies) *dependencies = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph,
                                         const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                         size_t *count) {
  if (edges) *edges = NULL;
  return capture_info(stream, status, id, graph, dependencies, count);
}
#else
API cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **dependencies, size_t *count) {
  return capture_info(stream, status, id, graph, dependencies, count);
}
#endif
