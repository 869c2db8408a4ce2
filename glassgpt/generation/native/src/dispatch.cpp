// Which kernels this machine can run. GG_HAS_... says which were compiled.
#include "engine.h"
#include "kernels.h"

#include <string>
#include <vector>

#define GG_DECLARE(isa) namespace isa { extern const Kernels kernels; }
GG_DECLARE(portable)
#if defined(__x86_64__)
GG_DECLARE(avx2)
GG_DECLARE(avxvnni)
GG_DECLARE(avx512)
GG_DECLARE(avx512bf16)
#include <cpuid.h>

static bool leaf7_1(int bit) {  // CPUID 7.1, EAX
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> bit & 1);
}
#endif

// Best first.
static std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    if (avx512 && leaf7_1(5)) found.push_back(&avx512bf16::kernels);
    if (avx512) found.push_back(&avx512::kernels);
    if (avx2 && leaf7_1(4)) found.push_back(&avxvnni::kernels);
    if (avx2) found.push_back(&avx2::kernels);
#endif
    found.push_back(&portable::kernels);
    return found;
}

const Kernels* find_kernels(const char* name) {
    for (const Kernels* kernels : usable())
        if (!name || std::string(name) == kernels->name) return kernels;
    return nullptr;
}

extern "C" const char* glass_kernels() {
    static const std::string names = [] {
        std::string all;
        for (const Kernels* kernels : usable()) all += (all.empty() ? "" : " ") + std::string(kernels->name);
        return all;
    }();
    return names.c_str();
}
