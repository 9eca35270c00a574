// NCCL: communicators of any size whose collectives move nothing. One record for each collective.
#include "standin.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
  int ranks, rank, device;
} Communicator;
typedef struct {
  char bytes[128];
} Id;

enum { SUCCESS = 0, FAILED = 1 };

API int ncclGetVersion(int *version) {
  *version = 22700;
  return SUCCESS;
}
API int ncclGetUniqueId(Id *id) {
  memset(id, 1, sizeof *id);
  return SUCCESS;
}
API const char *ncclGetErrorString(int error) {
  return "stand-in NCCL error";
}
API const char *ncclGetLastError(Communicator *communicator) {
  return "none";
}

static int create(Communicator **communicator, int ranks, int rank) {
  *communicator = malloc(sizeof **communicator);
  **communicator = (Communicator){ranks, rank, current_device()};
  return SUCCESS;
}
API int ncclCommInitRank(Communicator **communicator, int ranks, Id id, int rank) {
  return create(communicator, ranks, rank);
}
API int ncclCommInitRankConfig(Communicator **communicator, int ranks, Id id, int rank, void *config) {
  return create(communicator, ranks, rank);
}
API int ncclCommFinalize(Communicator *communicator) {
  return SUCCESS;
}
// Kept: a watchdog may still look at it.
API int ncclCommDestroy(Communicator *communicator) {
  return SUCCESS;
}
API int ncclCommAbort(Communicator *communicator) {
  return SUCCESS;
}
API int ncclCommGetAsyncError(Communicator *communicator, int *error) {
  *error = SUCCESS;
  return SUCCESS;
}
API int ncclCommCount(const Communicator *communicator, int *ranks) {
  *ranks = communicator->ranks;
  return SUCCESS;
}
API int ncclCommUserRank(const Communicator *communicator, int *rank) {
  *rank = communicator->rank;
  return SUCCESS;
}
API int ncclGroupStart(void) {
  return SUCCESS;
}
API int ncclGroupEnd(void) {
  return SUCCESS;
}

static int collective(const char *name, size_t count, int type, Communicator *communicator, void *stream) {
  return enqueue("kernel", name, stream, ",\"source\":\"nccl\",\"count\":%zu,\"type\":%d,\"ranks\":%d", count, type,
                 communicator->ranks)
             ? FAILED
             : SUCCESS;
}

API int ncclAllReduce(const void *send, void *receive, size_t count, int type, int operation, Communicator *c,
                      void *stream) {
  return collective("ncclAllReduce", count, type, c, stream);
}
API int ncclBroadcast(const void *send, void *receive, size_t count, int type, int root, Communicator *c,
                      void *stream) {
  return collective("ncclBroadcast", count, type, c, stream);
}
API int ncclBcast(void *buffer, size_t count, int type, int root, Communicator *c, void *stream) {
  return collective("ncclBcast", count, type, c, stream);
}
API int ncclReduce(const void *send, void *receive, size_t count, int type, int operation, int root, Communicator *c,
                   void *stream) {
  return collective("ncclReduce", count, type, c, stream);
}
API int ncclAllGather(const void *send, void *receive, size_t count, int type, Communicator *c, void *stream) {
  return collective("ncclAllGather", count, type, c, stream);
}
API int ncclReduceScatter(const void *send, void *receive, size_t count, int type, int operation, Communicator *c,
                          void *stream) {
  return collective("ncclReduceScatter", count, type, c, stream);
}
