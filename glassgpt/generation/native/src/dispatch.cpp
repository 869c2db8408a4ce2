// Which kernels this machine can run, of those that were compiled (GG_HAS_...).
#include "engine.h"
#include "kernels.h"

#include <string>
#include <vector>

#define GG_DECLARE(isa) namespace isa { extern const Kernels kernels; }
GG_DECLARE(portable)
GG_DECLARE(avx2)
GG_DECLARE(avxvnni)
GG_DECLARE(avx512)
GG_DECLARE(avx512bf16)
GG_DECLARE(amx)

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

struct Cpu {
    unsigned a = 0, b = 0, c = 0, d = 0;
    Cpu(int leaf, int part) { __get_cpuid_count(leaf, part, &a, &b, &c, &d); }
};

static bool has_amx() {
#if defined(GG_AMX_EMULATED)
    return true;
#elif defined(__linux__)
    constexpr int kTile = 24, kInt8 = 25, kAskFor = 0x1023, kTileData = 18;  // the system must allow the large registers
    const unsigned d = Cpu(7, 0).d;
    return d >> kTile & 1 && d >> kInt8 & 1 && syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
    return false;
#endif
}
#endif

// Best first.
static std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const unsigned newer = Cpu(7, 1).a;  // bit 4: AVX-VNNI, bit 5: AVX-512 BF16
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    const bool bfloat16 = avx512 && newer >> 5 & 1, vnni = avx2 && newer >> 4 & 1;
#if defined(GG_HAS_AMX)
    if (bfloat16 && has_amx()) found.push_back(&amx::kernels);
#endif
#if defined(GG_HAS_AVX512BF16)
    if (bfloat16) found.push_back(&avx512bf16::kernels);
#endif
#if defined(GG_HAS_AVX512)
    if (avx512) found.push_back(&avx512::kernels);
#endif
#if defined(GG_HAS_AVXVNNI)
    if (vnni) found.push_back(&avxvnni::kernels);
#endif
#if defined(GG_HAS_AVX2)
    if (avx2) found.push_back(&avx2::kernels);
#endif
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
