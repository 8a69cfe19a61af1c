// The device itself: its name, its context, and settings that change nothing here.
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "runtime/log.h"
#include "runtime/memory.h"
#include "runtime/stream.h"
#include "sim.h"

using namespace sim;

namespace {
int32_t current_device = 0;
thread_local void *current_context = nullptr;
int context_of_device;  // its address is the handle
uint32_t device_count() {
  const char *given = getenv("SIM_DEVICES");
  return given == nullptr ? 8 : uint32_t(atoi(given));  // of a server with 8 cards; each process has its own memory
}
}  // namespace

extern "C" {

int aclInit(const char *config) {
  memory::watch_for_faults();
  return OK;
}
int aclFinalize() {
  log::flush();
  return OK;
}
const char *aclrtGetSocName() { return "Ascend910B2"; }
int aclsysGetCANNVersion(int32_t package, void *version) {
  memset(version, 0, 128);
  strcpy(static_cast<char *>(version), "8.1.RC1");
  return OK;
}

int aclrtGetDeviceCount(uint32_t *count) {
  *count = device_count();
  return OK;
}
int aclrtSetDevice(int32_t device) {
  return guard([&] {
    if (device < 0 || uint32_t(device) >= device_count())
      throw Error(107001, format("there is no device %d; %u are simulated (SIM_DEVICES)", device, device_count()));
    current_device = device;
    current_context = &context_of_device;
  });
}
int aclrtGetDevice(int32_t *device) {
  *device = current_device;
  return OK;
}
int aclrtResetDevice(int32_t device) { return OK; }
int aclrtCreateContext(void **context, int32_t device) {
  *context = current_context = &context_of_device;
  return OK;
}
int aclrtDestroyContext(void *context) { return OK; }
int aclrtSetCurrentContext(void *context) {
  current_context = context;
  return OK;
}
int aclrtGetCurrentContext(void **context) {
  *context = current_context;
  return current_context == nullptr ? 107002 : OK;  // ACL_ERROR_RT_CONTEXT_NULL
}
int aclrtGetRunMode(int32_t *mode) {
  *mode = 1;  // ACL_HOST
  return OK;
}

int aclrtProcessReport(int32_t milliseconds) {  // callbacks run in their stream: there is none to wait for
  usleep(1000 * (milliseconds < 0 || milliseconds > 100 ? 100 : milliseconds));
  return OK;
}

int aclrtDeviceGetStreamPriorityRange(int32_t *lowest, int32_t *highest) {
  *lowest = 7;
  *highest = 0;
  return OK;
}
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
  *can = 0;
  return OK;
}
int aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) { return OK; }
int aclrtGetDeviceResLimit(int32_t device, int32_t type, uint32_t *value) {
  *value = type == 0 ? 24 : 48;  // cube and vector cores of a 910B2
  return OK;
}
int aclrtGetStreamResLimit(void *stream, int32_t type, uint32_t *value) { return aclrtGetDeviceResLimit(0, type, value); }
int aclrtGetResInCurrentThread(int32_t type, uint32_t *value) { return aclrtGetDeviceResLimit(0, type, value); }

// Nothing here depends on these.
int aclrtSetDeviceResLimit(int32_t device, int32_t type, uint32_t value) { return OK; }
int aclrtSetStreamResLimit(void *stream, int32_t type, uint32_t value) { return OK; }
int aclrtResetStreamResLimit(void *stream) { return OK; }
int aclrtUseStreamResInCurrentThread(void *stream) { return OK; }
int aclrtSetDeviceSatMode(int32_t mode) { return OK; }
int aclrtSetExceptionInfoCallback(void *callback) { return OK; }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return OK; }
int aclrtSetOpWaitTimeout(uint32_t seconds) { return OK; }
int aclrtSetStreamFailureMode(void *stream, uint64_t mode) { return OK; }
int aclrtCtxSetSysParamOpt(int32_t option, int64_t value) { return OK; }
int aclrtSubscribeReport(uint64_t thread, void *stream) { return OK; }
int aclrtUnSubscribeReport(uint64_t thread, void *stream) { return OK; }
int aclrtGetLastError(int32_t level) { return OK; }
int aclrtDeviceTaskAbort(int32_t device, uint32_t milliseconds) { return OK; }
int aclmdlInitDump() { return OK; }
int aclmdlSetDump(const char *config) { return OK; }
int aclmdlFinalizeDump() { return OK; }
int HcclSetConfig(int32_t config, uint64_t value) { return OK; }  // deterministic sums: they always are
int halHostRegister(void *host, uint64_t bytes, uint32_t flags, uint32_t device, void **address) {
  *address = host;
  return OK;
}
int halHostUnregister(void *host, uint32_t device) { return OK; }
int CheckLogLevel(int module, int level) { return 0; }
void DlogRecord(int module, int level, const char *form, ...) {}
char *mmSysGetEnv(int) { return nullptr; }

// Profiling: starts and stops, and records nothing.
int aclprofInit(const char *path, size_t length) { return OK; }
int aclprofFinalize() { return OK; }
void *aclprofCreateConfig(uint32_t *devices, uint32_t count, int32_t metrics, const void *events, uint64_t types) {
  return &context_of_device;
}
int aclprofDestroyConfig(const void *config) { return OK; }
int aclprofSetConfig(int32_t type, const char *config, size_t length) { return OK; }
int aclprofStart(const void *config) { return OK; }
int aclprofStop(const void *config) { return OK; }
void *aclprofCreateStepInfo() { return &context_of_device; }
int aclprofGetStepTimestamp(void *step, int32_t tag, void *stream) { return OK; }
void aclprofDestroyStepInfo(void *step) {}
int aclprofGetSupportedFeatures(size_t *size, void **features) {
  *size = 0;
  return OK;
}
int aclprofGetSupportedFeaturesV2(size_t *size, void **features) { return aclprofGetSupportedFeatures(size, features); }

// The channel by which a graph prints: nothing ever comes through it.
void *acltdtCreateChannelWithCapacity(uint32_t device, const char *name, size_t capacity) { return &context_of_device; }
void *acltdtCreateChannel(uint32_t device, const char *name) { return &context_of_device; }
int acltdtDestroyChannel(void *channel) { return OK; }
int acltdtStopChannel(void *channel) { return OK; }
int acltdtCleanChannel(void *channel) { return OK; }
void *acltdtCreateDataset() { return &context_of_device; }
int acltdtDestroyDataset(void *dataset) { return OK; }
int acltdtReceiveTensor(const void *channel, void *dataset, int32_t milliseconds) {
  usleep(100000);
  return 207013;  // ACL_ERROR_RT_QUEUE_EMPTY: ask again
}
int acltdtQueryChannelSize(const void *channel, size_t *size) {
  *size = 0;
  return OK;
}
}
