// cuBLAS and cuBLASLt: one record for each product. Its handles keep the stream and the math mode.
#include "standin.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
  void *stream;
  int math, pointer;
} Handle;

// CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: sums of a product's parts are kept in float32.
#define EXACT_SUMS 16
enum { SUCCESS = 0, FAILED = 13 };

API int cublasCreate_v2(Handle **handle) {
  *handle = calloc(1, sizeof **handle);
  return SUCCESS;
}
API int cublasDestroy_v2(Handle *handle) {
  free(handle);
  return SUCCESS;
}
API int cublasSetStream_v2(Handle *handle, void *stream) {
  handle->stream = stream;
  return SUCCESS;
}
API int cublasGetStream_v2(Handle *handle, void **stream) {
  *stream = handle->stream;
  return SUCCESS;
}
API int cublasSetWorkspace_v2(Handle *handle, void *workspace, size_t size) {
  return SUCCESS;
}
API int cublasSetMathMode(Handle *handle, int mode) {
  handle->math = mode;
  return SUCCESS;
}
API int cublasGetMathMode(Handle *handle, int *mode) {
  *mode = handle->math;
  return SUCCESS;
}
API int cublasSetPointerMode_v2(Handle *handle, int mode) {
  handle->pointer = mode;
  return SUCCESS;
}
API int cublasGetPointerMode_v2(Handle *handle, int *mode) {
  *mode = handle->pointer;
  return SUCCESS;
}
API int cublasSetSmCountTarget(Handle *handle, int count) {
  return SUCCESS;
}

// ------------------------------------------------------------------------------------------------- products

static int product(Handle *handle, const char *name, int ta, int tb, int m, int n, int k, int batch, int type) {
  return enqueue("kernel", name, handle->stream,
                 ",\"source\":\"library\",\"m\":%d,\"n\":%d,\"k\":%d,\"batch\":%d,\"transposed\":\"%c%c\",\"type\":%d,"
                 "\"exact_sums\":%s",
                 m, n, k, batch, ta ? 'T' : 'N', tb ? 'T' : 'N', type, handle->math & EXACT_SUMS ? "true" : "false")
             ? FAILED
             : SUCCESS;
}

enum { FLOAT32 = 0, FLOAT64 = 1 };

API int cublasGemmEx(Handle *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int a_type,
                     int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type, int ldc,
                     int compute, int algorithm) {
  return product(h, "cublasGemmEx", ta, tb, m, n, k, 1, a_type);
}
API int cublasSgemm_v2(Handle *h, int ta, int tb, int m, int n, int k) {
  return product(h, "cublasSgemm", ta, tb, m, n, k, 1, FLOAT32);
}
API int cublasDgemm_v2(Handle *h, int ta, int tb, int m, int n, int k) {
  return product(h, "cublasDgemm", ta, tb, m, n, k, 1, FLOAT64);
}
API int cublasSgemmEx(Handle *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int a_type) {
  return product(h, "cublasSgemmEx", ta, tb, m, n, k, 1, a_type);
}
API int cublasGemmStridedBatchedEx(Handle *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                                   int a_type, int lda, long long stride_a, const void *b, int b_type, int ldb,
                                   long long stride_b, const void *beta, void *c, int c_type, int ldc,
                                   long long stride_c, int batch, int compute, int algorithm) {
  return product(h, "cublasGemmStridedBatchedEx", ta, tb, m, n, k, batch, a_type);
}
API int cublasSgemmStridedBatched(Handle *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                                  int lda, long long stride_a, const void *b, int ldb, long long stride_b,
                                  const void *beta, void *c, int ldc, long long stride_c, int batch) {
  return product(h, "cublasSgemmStridedBatched", ta, tb, m, n, k, batch, FLOAT32);
}
API int cublasSgemv_v2(Handle *h, int ta, int m, int n) {
  return product(h, "cublasSgemv", ta, 0, m, 1, n, 1, FLOAT32);
}
API int cublasSdot_v2(Handle *h, int n) {
  return product(h, "cublasSdot", 0, 0, 1, 1, n, 1, FLOAT32);
}
API int cublasDotEx(Handle *h, int n, const void *x, int x_type) {
  return product(h, "cublasDotEx", 0, 0, 1, 1, n, 1, x_type);
}

// ------------------------------------------------------------------------------------------------ cuBLASLt

// Which attributes are read; their numbers are the library's.
enum { DESCRIPTION_TRANSPOSE_A = 3, DESCRIPTION_TRANSPOSE_B = 4, PREFERENCE_REDUCTION = 3 };

typedef struct {
  int transpose_a, transpose_b;
} Description;

typedef struct {
  int type;
  unsigned long rows, columns;
} Layout;

// What the last preference of this thread said; the product itself is not given it.
static __thread int exact_sums = 0;

API int cublasLtMatmulDescCreate(Description **description, int compute, int scale) {
  *description = calloc(1, sizeof **description);
  return SUCCESS;
}
API int cublasLtMatmulDescDestroy(Description *description) {
  free(description);
  return SUCCESS;
}
API int cublasLtMatmulDescSetAttribute(Description *description, int which, const void *value, size_t size) {
  if (which == DESCRIPTION_TRANSPOSE_A) memcpy(&description->transpose_a, value, sizeof(int));
  if (which == DESCRIPTION_TRANSPOSE_B) memcpy(&description->transpose_b, value, sizeof(int));
  return SUCCESS;
}
API int cublasLtMatmulPreferenceCreate(void **preference) {
  exact_sums = 0;
  *preference = calloc(1, 64);
  return SUCCESS;
}
API int cublasLtMatmulPreferenceDestroy(void *preference) {
  free(preference);
  return SUCCESS;
}
API int cublasLtMatmulPreferenceSetAttribute(void *preference, int which, const void *value, size_t size) {
  if (which == PREFERENCE_REDUCTION) exact_sums = 1;
  return SUCCESS;
}
API int cublasLtMatrixLayoutCreate(Layout **layout, int type, unsigned long rows, unsigned long columns, long lead) {
  *layout = malloc(sizeof **layout);
  **layout = (Layout){type, rows, columns};
  return SUCCESS;
}
API int cublasLtMatrixLayoutDestroy(Layout *layout) {
  free(layout);
  return SUCCESS;
}
API int cublasLtMatrixLayoutSetAttribute(Layout *layout, int which, const void *value, size_t size) {
  return SUCCESS;
}
API int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c, void *d,
                                       void *preference, int asked, void *results, int *found) {
  // One result: the algorithm's 64 bytes, workspace, status, waves and four reserved words.
  memset(results, 0, 64 + 8 + 4 + 4 + 16);
  *found = 1;
  return SUCCESS;
}
API int cublasLtMatmul(void *handle, Description *description, const void *alpha, const void *a, Layout *a_layout,
                       const void *b, Layout *b_layout, const void *beta, const void *c, Layout *c_layout, void *d,
                       Layout *d_layout, const void *algorithm, void *workspace, size_t size, void *stream) {
  unsigned long k = description->transpose_a ? a_layout->rows : a_layout->columns;
  return enqueue("kernel", "cublasLtMatmul", stream,
                 ",\"source\":\"library\",\"m\":%lu,\"n\":%lu,\"k\":%lu,\"batch\":1,\"transposed\":\"%c%c\",\"type\":%d,"
                 "\"exact_sums\":%s",
                 d_layout->rows, d_layout->columns, k, description->transpose_a ? 'T' : 'N',
                 description->transpose_b ? 'T' : 'N', a_layout->type, exact_sums ? "true" : "false")
             ? FAILED
             : SUCCESS;
}

// ----------------------------------------------------------------------------------------------- unmodelled

#define UNMODELLED(function)                             \
  int unmodelled_##function(void) __asm__(#function) API; \
  int unmodelled_##function(void) {                      \
    unmodelled(#function);                               \
    return FAILED;                                       \
  }
UNMODELLED(cublasDdot_v2)
UNMODELLED(cublasDgemmStridedBatched)
UNMODELLED(cublasDgemv_v2)
UNMODELLED(cublasDgetrfBatched)
UNMODELLED(cublasDtrsm_v2)
UNMODELLED(cublasSgemmBatched)
UNMODELLED(cublasSgetrfBatched)
UNMODELLED(cublasStrsm_v2)
UNMODELLED(cublasStrsmBatched)
