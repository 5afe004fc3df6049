// Kernels of MUL_MAT_ID of the Metal backend as C++, each thread of a threadgroup a std::thread.
//
//     mul_mat_id [map|vec|fill]     exit status 1 if a result is wrong
//
// kernels.inc is cut from the .metal files. Every buffer is a heap block of its exact size, for AddressSanitizer.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "ggml-metal-impl.h"

using std::min;
using ushort = uint16_t;
using uint   = uint32_t;
struct uint3 { uint x, y, z; };

#define kernel
#define device
#define threadgroup
#define constant const

enum class mem_flags { mem_threadgroup };
static std::unique_ptr<std::barrier<>> group;
static void threadgroup_barrier(mem_flags) { group->arrive_and_wait(); }

constexpr int N_SIMDWIDTH = 32;
constexpr short FC_mul_mv_nsg = 2;

typedef void mul_mv_disp_fn_t(ggml_metal_kargs_mul_mv, const char *, const char *, char *, char *, uint3, ushort, ushort, ushort);

#include "kernels.inc"

static void run_group(int n, const std::function<void(int)> & body) {
    group = std::make_unique<std::barrier<>>(n);
    std::vector<std::thread> threads;
    for (int i = 0; i < n; ++i) {
        threads.emplace_back(body, i);
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

// ids of tokens: n_skipped of the n_used slots select no matrix
static std::vector<int32_t> make_ids(int n_as, int n_used, int n_tokens, int n_skipped) {
    const int32_t none[] = { -1, n_as, 65536, INT32_MAX, 65536 + n_as };
    std::vector<int32_t> ids;
    for (int i = 0; i < n_tokens * n_used; ++i) {
        const int token = i / n_used, slot = i % n_used;
        ids.push_back(slot < n_skipped ? none[i % 5] : (token + slot) % n_as);
    }
    return ids;
}

template <int n_used> static bool check_map(int n_as, int n_tokens, int n_skipped, int n_threads) {
    const std::vector<int32_t> ids = make_ids(n_as, n_used, n_tokens, n_skipped);
    std::vector<uint32_t> counts(n_as);
    std::vector<int32_t>  rows(n_as * n_tokens, -2);
    std::vector<char>     shared((n_threads * n_used * sizeof(uint16_t) + 15) / 16 * 16);
    ggml_metal_kargs_mul_mm_id_map0 args = {};
    args.ne02 = n_as;
    args.ne21 = n_tokens;
    args.ne20 = n_used;
    args.nb21 = n_used * sizeof(int32_t);
    run_group(n_threads, [&](int i) {
        kernel_mul_mm_id_map0<n_used>(args, (const char *) ids.data(), (char *) counts.data(), (char *) rows.data(), shared.data(), i, n_threads);
    });
    bool ok = true;
    for (int e = 0; e < n_as; ++e) {
        std::vector<int32_t> expected;
        for (int i = 0; i < n_tokens * n_used; ++i) {
            if (ids[i] == e) {
                expected.push_back(i);
            }
        }
        ok = ok && counts[e] == expected.size() && std::equal(expected.begin(), expected.end(), rows.begin() + e * n_tokens);
    }
    return ok;
}

static bool check_maps() {
    bool ok = true;
    for (int n_tokens : { 1, 33, 70 }) {
        for (int n_threads : { 5, 32 }) { // one per matrix, as unflagged nodes have, and padded
            ok = check_map<1>(5, n_tokens, 1, n_threads) && check_map<4>(5, n_tokens, 0, n_threads) && check_map<4>(5, n_tokens, 3, n_threads) && ok;
        }
        ok = check_map<8>(40, n_tokens, 4, 40) && check_map<4>(1, n_tokens, 3, 32) && ok;
    }
    return ok;
}

// stands in for the dot products of one type; a threadgroup computes 16 rows
static void reference(ggml_metal_kargs_mul_mv args, const char * src0, const char * src1, char * dst, char *, uint3 tgpig, ushort tiitg, ushort, ushort) {
    for (int row = 16 * tgpig.x; tiitg == 0 && row < std::min<int>(16 * tgpig.x + 16, args.ne01); ++row) {
        float sum = 0.0f;
        for (int i = 0; i < args.ne00; ++i) {
            sum += ((const float *) (src0 + row * args.nb01))[i] * ((const float *) src1)[i];
        }
        ((float *) dst)[row] = sum;
    }
}

static bool check_vec(int n_tokens, int n_skipped) {
    const int n_as = 3, n_used = 3, k = 8, m = 70;
    const std::vector<int32_t> ids = make_ids(n_as, n_used, n_tokens, n_skipped);
    std::vector<float> as(n_as * m * k), b(n_tokens * n_used * k), dst(n_tokens * n_used * m, NAN);
    for (size_t i = 0; i < as.size(); ++i) { as[i] = int(i * 7 % 13) - 6; }
    for (size_t i = 0; i <  b.size(); ++i) {  b[i] = int(i * 5 % 11) - 5; }
    ggml_metal_kargs_mul_mv_id args = {};
    args.nei0 = args.ne1 = args.ne11 = n_used;
    args.nbi1 = n_used * sizeof(int32_t);
    args.ne00 = args.ne10 = k;
    args.ne01 = args.ne0  = m;
    args.ne02 = n_as;
    args.nb01 = args.nb11 = k * sizeof(float);
    args.nb02 = m * args.nb01;
    args.nb12 = n_used * args.nb11;
    for (uint z = 0; z < uint(n_tokens * n_used); ++z) {
        for (uint x = 0; x < uint(m + 15) / 16; ++x) {
            run_group(N_SIMDWIDTH * FC_mul_mv_nsg, [&](int i) {
                kernel_mul_mv_id<reference>(args, (const char *) as.data(), (const char *) b.data(), (char *) dst.data(), (const char *) ids.data(),
                    nullptr, { x, 0, z }, i, i % 32, i / 32);
            });
        }
    }
    bool ok = true;
    for (size_t i = 0; i < dst.size(); ++i) {
        const int32_t id = ids[i / m];
        float expected = 0.0f;
        for (int j = 0; id >= 0 && id < n_as && j < k; ++j) {
            expected += as[(id * m + i % m) * k + j] * b[i / m * k + j];
        }
        ok = ok && dst[i] == expected;
    }
    return ok;
}

// as ggml-metal-ops.cpp dispatches it
static bool check_fill(int64_t n) {
    std::vector<float> dst(n, NAN);
    const ggml_metal_kargs_memset args = { 0 };
    const int64_t n_threads = std::min<int64_t>(n & -n, 256);
    for (int64_t i = 0; i < n / n_threads * n_threads; ++i) {
        kernel_memset<float>(args, dst.data(), i);
    }
    return std::count(dst.begin(), dst.end(), 0.0f) == n;
}

int main(int, char ** argv) {
    bool ok = true;
    if (!strcmp(argv[1], "map")) {
        ok = check_maps();
    } else if (!strcmp(argv[1], "vec")) {
        ok = check_vec(1, 0) && check_vec(2, 2);
    } else {
        ok = check_fill(64 * 9) && check_fill(2048 * 24) && check_fill(35);
    }
    printf("%s %s\n", ok ? "ok" : "WRONG", argv[1]);
    return !ok;
}
