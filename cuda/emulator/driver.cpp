// A libcuda for tests: the driver functions that rust/cuda loads, with kernels run on the host.
//
// FERROMOE_LIBCUDA names it. What it pretends to be comes from the environment:
//   EMULATOR_VERSION   what cuDriverGetVersion says (default 13000)
//   EMULATOR_INIT      result of cuInit (default 0; 100 is CUDA_ERROR_NO_DEVICE)
//   EMULATOR_DEVICES   number of GPUs (default 1)
//   EMULATOR_CC        compute capability (default 90)
//   EMULATOR_LOG       a file that gets one line per load and launch
// and, for the calling thread alone, from emulator_pretend().
#include "../permute.cu"

#include <stdarg.h>

#include <map>
#include <mutex>
#include <string>

namespace {

int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

void log(const char* format, ...) {
    const char* path = getenv("EMULATOR_LOG");
    FILE* file = path ? fopen(path, "a") : nullptr;
    if (file == nullptr) {
        return;
    }
    va_list arguments;
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fclose(file);
}

struct Entry {
    const char* name;
    void (*call)(void**);
};

template <typename P, void (*KERNEL)(P)> void call(void** arguments) {
    KERNEL(*static_cast<const P*>(arguments[0]));
}

const Entry KERNELS[] = {
    {"permute_rows", call<PermuteRows, permute_rows>},
    {"unpermute_f32", call<Unpermute, unpermute_f32>},
    {"unpermute_f64", call<Unpermute, unpermute_f64>},
    {"unpermute_f16", call<Unpermute, unpermute_f16>},
    {"unpermute_bf16", call<Unpermute, unpermute_bf16>},
    {"unpermute_backward_f32", call<UnpermuteBackward, unpermute_backward_f32>},
    {"unpermute_backward_f64", call<UnpermuteBackward, unpermute_backward_f64>},
    {"unpermute_backward_f16", call<UnpermuteBackward, unpermute_backward_f16>},
    {"unpermute_backward_bf16", call<UnpermuteBackward, unpermute_backward_bf16>},
};

int contexts[32];
thread_local std::vector<void*> stack;  // of current contexts
thread_local int capture_status, launch_result;
std::mutex running;

int current_device() { return static_cast<int>(static_cast<int*>(stack.back()) - contexts); }

enum {
    INVALID_VALUE = 1,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500
};

}  // namespace

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    const void* attributes;
    unsigned num_attributes;
};
static_assert(sizeof(LaunchConfig) == 56, "CUlaunchConfig");

extern "C" {

// From now on, on this thread: the status of every stream, and the result of every launch.
void emulator_pretend(int status, int result) {
    capture_status = status;
    launch_result = result;
}

int cuDriverGetVersion(int* version) {
    *version = setting("EMULATOR_VERSION", 13000);
    return 0;
}

int cuInit(unsigned) { return setting("EMULATOR_INIT", 0); }

int cuGetErrorName(int code, const char** name) {
    static const std::map<int, const char*> names = {
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {100, "CUDA_ERROR_NO_DEVICE"},
        {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    };
    const auto it = names.find(code);
    *name = it == names.end() ? nullptr : it->second;
    return it == names.end() ? INVALID_VALUE : 0;
}

int cuGetErrorString(int code, const char** text) {
    const int unknown = cuGetErrorName(code, text);
    if (!unknown) {
        *text = "said by the emulator";
    }
    return unknown;
}

int cuDeviceGetCount(int* count) {
    *count = setting("EMULATOR_DEVICES", 1);
    return 0;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < setting("EMULATOR_DEVICES", 1) ? 0 : INVALID_DEVICE;
}

int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, length, "ferromoe emulator");
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    const int cc = setting("EMULATOR_CC", 90);
    switch (attribute) {
    case 16:
        *value = 4;
        return 0;
    case 75:
        *value = cc / 10;
        return 0;
    case 76:
        *value = cc % 10;
        return 0;
    default:
        return INVALID_VALUE;
    }
}

int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = size_t{1} << 30;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &contexts[device];
    return 0;
}

int cuCtxGetCurrent(void** context) {
    *context = stack.empty() ? nullptr : stack.back();
    return 0;
}

int cuCtxPushCurrent_v2(void* context) {
    stack.push_back(context);
    return 0;
}

int cuCtxPopCurrent_v2(void** context) {
    if (stack.empty()) {
        return INVALID_CONTEXT;
    }
    *context = stack.back();
    stack.pop_back();
    return 0;
}

// A fat binary is known by its first word; what it holds is for GPUs.
int cuModuleLoadData(void** module, const void* image) {
    uint32_t magic;
    memcpy(&magic, image, sizeof magic);
    if (magic != 0xba55ed50) {
        return INVALID_IMAGE;
    }
    if (stack.empty()) {
        return INVALID_CONTEXT;
    }
    log("device %d load\n", current_device());
    *module = const_cast<void*>(image);
    return 0;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
    for (const Entry& entry : KERNELS) {
        if (strcmp(entry.name, name) == 0) {
            *function = const_cast<Entry*>(&entry);
            return 0;
        }
    }
    return NOT_FOUND;
}

int cuStreamIsCapturing(void*, int* status) {
    *status = capture_status;
    return 0;
}

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void**) {
    const auto& [grid, block, shared_bytes, stream, attributes, num_attributes] = *config;
    const Entry& entry = *static_cast<const Entry*>(function);
    const bool possible = grid[0] > 0 && grid[0] <= 0x7fffffff && grid[1] > 0 && grid[1] <= 65535 &&
                          grid[2] == 1 && block[0] > 0 && block[0] <= 256 && block[0] % 32 == 0 &&
                          block[1] == 1 && block[2] == 1 && shared_bytes == 0 &&
                          num_attributes == 0 && !stack.empty();
    if (!possible) {
        return INVALID_VALUE;
    }
    if (launch_result != 0) {
        return launch_result;
    }
    log("device %d %s grid %ux%u threads %u stream %p\n", current_device(), entry.name, grid[0],
        grid[1], block[0], stream);
    const std::lock_guard<std::mutex> lock(running);
    emulator::run({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                  [&] { entry.call(arguments); });
    return 0;
}

}  // extern "C"
