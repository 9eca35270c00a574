// The log of calls, the marks in it, and the count of violations. README.md describes the format.
#include "standin.h"

#include <execinfo.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static FILE *file = NULL;
static int violations = 0;
static char last_violation[1024] = "";
static char part[1024] = "";
static __thread cudaError_t error_of_thread = cudaSuccess;

// ------------------------------------------------------------------------------------------------ control
// What Python calls through ctypes.

API int standin_open(const char *path) {
  LOCKED;
  if (file) fclose(file);
  file = fopen(path, "w");
  return file != NULL;
}

API void standin_close(void) {
  LOCKED;
  if (file) fclose(file);
  file = NULL;
}

API void standin_begin(const char *name) {
  LOCKED;
  size_t used = strlen(part);
  snprintf(part + used, sizeof part - used, "%s%s", used ? "/" : "", name);
}

API void standin_end(void) {
  LOCKED;
  char *cut = strrchr(part, '/');
  *(cut ? cut : part) = 0;
}

API int standin_violations(void) {
  return violations;
}

API const char *standin_last_violation(void) {
  return last_violation;
}

// ------------------------------------------------------------------------------------------------ records

int log_is_open(void) {
  return file != NULL;
}

static void write_text(const char *text) {
  fputc('"', file);
  for (; *text; text++) {
    if (*text == '"' || *text == '\\') fputc('\\', file);
    if ((unsigned char)*text >= ' ') fputc(*text, file);
  }
  fputc('"', file);
}

static void write_members(const char *kind, const char *name, const Stream *stream, const char *more, va_list args) {
  if (!file) return;
  fprintf(file, "{\"kind\":\"%s\",\"name\":", kind);
  write_text(name);
  fputs(",\"part\":", file);
  write_text(part);
  fprintf(file, ",\"stream\":%d,\"graph\":%d", stream ? stream->id : -1,
          stream && stream->capture ? stream->capture->graph->id : 0);
  vfprintf(file, more, args);
  fputs("}\n", file);
}

void write_record(const char *kind, const char *name, const Stream *stream, const char *more, ...) {
  va_list args;
  va_start(args, more);
  write_members(kind, name, stream, more, args);
  va_end(args);
}

// ------------------------------------------------------------------------------------------------- errors

cudaError_t violation(cudaError_t error, const char *text, ...) {
  va_list args;
  va_start(args, text);
  vsnprintf(last_violation, sizeof last_violation, text, args);
  va_end(args);
  violations++;
  fprintf(stderr, "VIOLATION: %s\n", last_violation);
  write_record("violation", last_violation, NULL, "%s", "");
  if (getenv("STANDIN_TRACE")) {
    void *frames[60];
    backtrace_symbols_fd(frames, backtrace(frames, 60), 2);
  }
  return error_of_thread = error;
}

cudaError_t unmodelled(const char *function) {
  return violation(cudaErrorNotSupported, "%s is not modelled by the stand-in library", function);
}

cudaError_t last_error(int clear) {
  cudaError_t error = error_of_thread;
  if (clear) error_of_thread = cudaSuccess;
  return error;
}
