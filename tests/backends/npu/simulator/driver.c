/* Stands in for CANN's libraries under torch_npu: device memory is memory of the host, and there is one device.
 *
 * torch_npu is linked against functions of these libraries and looks others up by name (Ascend/pytorch
 * third_party/acl/inc/acl). Those of memory, devices and names do what their documentation says; the others only succeed:
 * nothing here computes. Operators get their bodies in Python.
 *
 * Environment: SIMULATED_SOC (name, for example Ascend910B2), SIMULATED_MEMORY (bytes), SIMULATED_CANN (version).
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK 0
#define OUT_OF_MEMORY 207001 /* ACL_ERROR_RT_MEMORY_ALLOCATION */
#define HEADER 512           /* torch_npu expects this alignment; the size is kept in front of what is given out */

static size_t used, peak;

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

static size_t total(void) { return strtoull(setting("SIMULATED_MEMORY", "68719476736"), NULL, 10); }

/* What the tests read: bytes that are allocated, and the most that ever were. */
size_t simulated_used(void) { return used; }
size_t simulated_peak(void) { return peak; }
void simulated_reset_peak(void) { peak = used; }

int aclrtMalloc(void **out, size_t size, int policy) {
    (void)policy;
    char *base;
    if (used + size > total() || posix_memalign((void **)&base, HEADER, size + HEADER)) return OUT_OF_MEMORY;
    *(size_t *)base = size;
    memset(base + HEADER, 0xA5, size); /* fresh device memory is not zero */
    used += size;
    peak = used > peak ? used : peak;
    *out = base + HEADER;
    return OK;
}

int aclrtMallocAlign32(void **out, size_t size, int policy) { return aclrtMalloc(out, size, policy); }

int aclrtFree(void *pointer) {
    if (pointer) {
        char *base = (char *)pointer - HEADER;
        used -= *(size_t *)base;
        free(base);
    }
    return OK;
}

int aclrtMallocHost(void **out, size_t size) { return posix_memalign(out, HEADER, size) ? OUT_OF_MEMORY : OK; }
int aclrtMallocHostWithCfg(void **out, uint64_t size, void *config) { return (void)config, aclrtMallocHost(out, size); }
int aclrtFreeHost(void *pointer) { return free(pointer), OK; }

int aclrtMemcpy(void *to, size_t most, const void *from, size_t count, int kind) {
    (void)kind;
    if (count > most) return 107000; /* ACL_ERROR_RT_PARAM_INVALID */
    return memmove(to, from, count), OK;
}

int aclrtMemcpyAsync(void *to, size_t most, const void *from, size_t count, int kind, void *stream) {
    return (void)stream, aclrtMemcpy(to, most, from, count, kind);
}

int aclrtMemset(void *to, size_t most, int value, size_t count) {
    return count > most ? 107000 : (memset(to, value, count), OK);
}

int aclrtMemsetAsync(void *to, size_t most, int value, size_t count, void *stream) {
    return (void)stream, aclrtMemset(to, most, value, count);
}

int aclrtGetMemInfo(int attribute, size_t *available, size_t *all) {
    (void)attribute;
    *all = total();
    *available = *all - used;
    return OK;
}

const char *aclrtGetSocName(void) { return setting("SIMULATED_SOC", "Ascend910B2"); }
const char *aclGetRecentErrMsg(void) { return ""; }
int aclrtSetDevice(int device) { return device == 0 ? OK : 107001; /* ACL_ERROR_RT_INVALID_DEVICEID */ }
int aclrtGetDevice(int *device) { return *device = 0, OK; }
int aclrtGetDeviceCount(uint32_t *count) { return *count = 1, OK; }
int aclrtGetPrimaryCtxState(int device, uint32_t *flags, int *active) { return (void)device, (void)flags, *active = 1, OK; }

int aclsysGetVersionStr(char *package, char *version) {
    return (void)package, strcpy(version, setting("SIMULATED_CANN", "8.5.0")), OK;
}

static int handle(void **out) {
    static int one;
    return *out = &one, OK;
}
int aclrtGetCurrentContext(void **context) { return handle(context); }
int aclrtCreateStream(void **stream) { return handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { return (void)priority, (void)flag, handle(stream); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return (void)flag, handle(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return (void)flag, handle(event); }
size_t aclGetCompileoptSize(int option) { return (void)option, sizeof "disable"; }
int aclGetCompileopt(int option, char *value, size_t size) { return (void)option, strncpy(value, "disable", size), OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { return (void)option, *value = 0, OK; }

/* Everything is done when it is asked for: complete (1), ready (0). */
int aclrtStreamQuery(void *stream, int *status) { return (void)stream, *status = 0, OK; }
int aclrtQueryEventStatus(void *event, int *status) { return (void)event, *status = 1, OK; }
int aclrtQueryEventWaitStatus(void *event, int *status) { return (void)event, *status = 0, OK; }

#define Z(name) \
    int name() { return OK; }
Z(MsprofGetHashId) Z(MsprofRegisterCallback) Z(MsprofReportAdditionalInfo) Z(MsprofReportApi) Z(MsprofReportCompactInfo)
Z(MsprofSysCycleTime) Z(aclAppLog) Z(aclCreateDataBuffer) Z(aclCreateTensorDesc) Z(aclDestroyDataBuffer)
Z(aclDestroyTensorDesc) Z(aclFinalize) Z(aclGetDeviceCapability)
Z(aclGetTensorDescDimV2) Z(aclGetTensorDescFormat) Z(aclGetTensorDescNumDims) Z(aclGetTensorDescType) Z(aclInit)
Z(aclSetCompileopt) Z(aclSetTensorDescName) Z(aclSetTensorFormat) Z(aclSetTensorPlaceMent) Z(aclSetTensorShape)
Z(aclmdlFinalizeDump) Z(aclmdlInitDump) Z(aclmdlSetDump) Z(aclopCompileAndExecute) Z(aclopCreateAttr) Z(aclopDestroyAttr)
Z(aclopSetAttrBool) Z(aclopSetAttrDataType) Z(aclopSetAttrFloat) Z(aclopSetAttrInt) Z(aclopSetAttrListBool)
Z(aclopSetAttrListFloat) Z(aclopSetAttrListInt) Z(aclopSetAttrListListInt) Z(aclopSetAttrString) Z(aclrtBinaryGetFunction)
Z(aclrtBinaryLoadFromData) Z(aclrtCtxSetSysParamOpt) Z(aclrtDestroyEvent) Z(aclrtDestroyStream) Z(aclrtDestroyStreamForce)
Z(aclrtDeviceCanAccessPeer) Z(aclrtDeviceEnablePeerAccess) Z(aclrtDeviceGetBareTgid) Z(aclrtEventElapsedTime)
Z(aclrtFreePhysical) Z(aclrtGetFunctionAddr) Z(aclrtGetLastError) Z(aclrtMallocPhysical) Z(aclrtMapMem)
Z(aclrtMemExportToShareableHandle) Z(aclrtMemImportFromShareableHandle) Z(aclrtMemSetPidToShareableHandle)
Z(aclrtPeekAtLastError) Z(aclrtProcessReport) Z(aclrtRecordEvent) Z(aclrtReleaseMemAddress) Z(aclrtReserveMemAddress)
Z(aclrtResetDevice) Z(aclrtResetEvent) Z(aclrtSetCurrentContext) Z(aclrtSetDeviceSatMode) Z(aclrtSetOpExecuteTimeOut)
Z(aclrtSetOpExecuteTimeOutV2) Z(aclrtSetOpWaitTimeout) Z(aclrtSetStreamAttribute) Z(aclrtSetStreamFailureMode)
Z(aclrtSetStreamOverflowSwitch) Z(aclrtSetSysParamOpt) Z(aclrtStreamGetId) Z(aclrtStreamWaitEvent) Z(aclrtSynchronizeDevice)
Z(aclrtSynchronizeDeviceWithTimeout) Z(aclrtSynchronizeEvent) Z(aclrtSynchronizeStream) Z(aclrtSynchronizeStreamWithTimeout)
Z(aclrtUnmapMem) Z(rtDevBinaryRegister) Z(rtFunctionRegister) Z(rtGetC2cCtrlAddr) Z(rtKernelLaunch)
