// Graphs: what a capture recorded, and its replays.
#include "standin.h"

API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  LOCKED;
  Stream *stream = stream_of(handle);
  *graph = NULL;
  if (!stream->capture) return violation(cudaErrorIllegalState, "a capture ends that never began");
  cudaError_t error;
  Graph *captured = end_capture(stream, &error);
  if (!error) *graph = (cudaGraph_t)captured;
  return error;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  LOCKED;
  *executable = (cudaGraphExec_t)graph;
  return unsafe("cudaGraphInstantiate");
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  LOCKED;
  count_graph_launch();
  return enqueue("graph", "launch", stream, ",\"replays\":%d", ((Graph *)executable)->id);
}

// A graph is kept: its number stands in the log.
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t *nodes, size_t *count) {
  Graph *graph = (Graph *)handle;
  *count = graph->kernels + graph->copies + graph->memsets + graph->hosts;
  return cudaSuccess;
}
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) {
  return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *data, cudaHostFn_t destroy, unsigned count,
                                     unsigned flags) {
  *object = (cudaUserObject_t)data;
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
  return cudaSuccess;
}
