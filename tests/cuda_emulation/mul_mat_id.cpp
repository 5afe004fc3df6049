// MUL_MAT_ID of the CUDA backend, emulated, against the CPU backend: random inputs, none, some or all slots skipped.
//
//     mul_mat_id [PATH [none|some|all]]     paths: see main(); a line per case, exit status 1 if one is wrong
//
// Every tensor is a heap block of its exact size, so that AddressSanitizer sees what is read or written beside it.
// The expected product is that of ggml-cpu; reference_mul_mat_q below stands in for the matrix product of MMQ, which
// multiplies what quantize.cu wrote (the kernel itself reads past the end of a tile by design).
#include <cinttypes>
#include <cstdarg>
#include <random>

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include "common.cuh"
#include "mmid.cuh"
#include "mmq.cuh"
#include "mmvf.cuh"
#include "mmvq.cuh"
#include "quantize.cuh"

void ggml_cuda_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst); // static in ggml-cuda.cu, see mul_mat_id_of()

// ------------------------------------------------------------------------------------------------- the rest of the backend

struct heap_pool : ggml_cuda_pool {
    void * alloc(size_t size, size_t * actual_size) override {
        *actual_size = size;
        char * data = new char[size];
        memset(data, 0x55, size); // what an earlier use left behind; as an index, far outside
        return data;
    }
    void free(void * data, size_t) override { delete[] (char *) data; }
};

std::unique_ptr<ggml_cuda_pool> ggml_backend_cuda_context::new_pool_for_device(int, int) { return std::make_unique<heap_pool>(); }
ggml_backend_cuda_context::~ggml_backend_cuda_context() = default;
int ggml_cuda_get_device() { return 0; }
void ggml_cuda_set_device(int) {}
void ggml_cuda_error(const char * stmt, const char *, const char * file, int line, const char *) {
    GGML_ABORT("%s:%d: %s", file, line, stmt);
}
const ggml_cuda_device_info & ggml_cuda_info() {
    static const ggml_cuda_device_info info = [] {
        ggml_cuda_device_info result = {};
        result.device_count = result.physical_device_count = 1;
        result.devices[0].cc = GGML_CUDA_CC_VOLTA;
        result.devices[0].nsm = 4;
        result.devices[0].smpb = result.devices[0].smpbo = 48 * 1024;
        result.devices[0].warp_size = 32;
        return result;
    }();
    return info;
}

static std::vector<float> row_of(ggml_type type, const void * data, int64_t n) {
    std::vector<float> row(n);
    if (type == GGML_TYPE_F32) {
        memcpy(row.data(), data, n * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(data, row.data(), n);
    }
    return row;
}

static double dot(const std::vector<float> & a, const std::vector<float> & b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        sum += double(a[i]) * b[i];
    }
    return sum;
}

// A column of what quantize_mmq_q8_1 wrote: blocks of 128 values, all columns of a block together.
static std::vector<float> quantized_column(const mmq_args & args, int64_t column) {
    const auto layout = mmq_get_q8_1_ds_layout(args.type_x);
    std::vector<float> values(args.ncols_x);
    for (int64_t i = 0; i < args.ncols_x; ++i) {
        const block_q8_1_mmq & block = ((const block_q8_1_mmq *) args.y)[i / QK8_1_MMQ * args.ncols_y + column];
        const int in_block = i % QK8_1_MMQ;
        const float scale = layout == MMQ_Q8_1_DS_LAYOUT_D4  ? block.d4[in_block / 32]
                          : layout == MMQ_Q8_1_DS_LAYOUT_DS4 ? float(block.ds4[in_block / 32].x)
                                                             : float(block.d2s6[in_block / 64]);
        values[i] = scale * block.qs[in_block];
    }
    return values;
}

void reference_mul_mat_q(ggml_backend_cuda_context &, const mmq_args & args, cudaStream_t) {
    const size_t row_size = ggml_row_size(args.type_x, args.ncols_x);
    const size_t block_size = ggml_type_size(args.type_x);
    GGML_ASSERT(size_t(args.stride_row_x) * block_size == row_size);
    for (int64_t expert = 0; expert < args.nchannels_x; ++expert) {
        for (int64_t column = args.expert_bounds[expert]; column < args.expert_bounds[expert + 1]; ++column) {
            const std::vector<float> y = quantized_column(args, column);
            for (int64_t row = 0; row < args.nrows_x; ++row) {
                const char * x = args.x + (expert * args.stride_channel_x + row * args.stride_row_x) * block_size;
                args.dst[args.ids_dst[column] * args.nrows_dst + row] = dot(row_of(args.type_x, x, args.ncols_x), y);
            }
        }
    }
}

// The products of the sorted fallback, one expert at a time; the real one is cuBLAS.
void ggml_cuda_mul_mat(ggml_backend_cuda_context &, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    for (int64_t column = 0; column < src1->ne[1]; ++column) {
        const std::vector<float> y = row_of(src1->type, (char *) src1->data + column * src1->nb[1], src1->ne[0]);
        for (int64_t row = 0; row < src0->ne[1]; ++row) {
            const std::vector<float> x = row_of(src0->type, (char *) src0->data + row * src0->nb[1], src0->ne[0]);
            ((float *) ((char *) dst->data + column * dst->nb[1]))[row] = dot(x, y);
        }
    }
}

// Rows `ids` of src, as the sorted fallback gathers them.
void get_rows_cuda(const void * src, ggml_type src_type, const int32_t * ids, void * dst, ggml_type dst_type, int64_t n, size_t src_stride,
                   size_t, size_t, int64_t n_rows, int64_t, int64_t, size_t, size_t, size_t, size_t dst_stride, size_t, size_t, cudaStream_t) {
    for (int64_t i = 0; i < n_rows; ++i) {
        const std::vector<float> row = row_of(src_type, (const char *) src + ids[i] * src_stride, n);
        ggml_quantize_chunk(dst_type, row.data(), (char *) dst + i * dst_stride, 0, 1, n, nullptr);
    }
}

// MMF needs tensor cores
bool ggml_cuda_should_use_mmf(ggml_type, int, int, const int64_t *, const size_t *, int, bool) { return false; }
void ggml_cuda_mul_mat_f(ggml_backend_cuda_context &, const ggml_tensor *, const ggml_tensor *, const ggml_tensor *, ggml_tensor *) {
    GGML_ABORT("no tensor cores");
}

// ------------------------------------------------------------------------------------------------------------------- cases

enum pattern { NONE, SOME, ALL };
static const char * const pattern_names[] = {"none", "some", "all"};
static std::mt19937 generator(1);
static bool all_right = true;

static void report(bool right, const char * format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s  ", right ? "ok   " : "WRONG");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    fflush(stdout);
    all_right = all_right && right;
}

// K distinct numbers below n_ids a token, from n_as on as many as the pattern says
static std::vector<int32_t> random_ids(int n_as, int n_ids, int n_used, int n_tokens, pattern skipped) {
    std::vector<int32_t> ids;
    const int first = skipped == ALL ? n_as : 0, last = skipped == NONE ? n_as : n_ids;
    std::vector<int32_t> choice(last - first);
    for (int token = 0; token < n_tokens; ++token) {
        for (size_t i = 0; i < choice.size(); ++i) {
            choice[i] = first + i;
        }
        std::shuffle(choice.begin(), choice.end(), generator);
        ids.insert(ids.end(), choice.begin(), choice.begin() + n_used);
    }
    if (skipped == SOME) { // at least one of each
        ids[0] = n_as + ids[0] % (n_ids - n_as);
        ids[n_used - 1] = (n_used > 1 ? ids[n_used - 1] : ids[0]) % n_as;
        for (int i = 1; i < n_used - 1; ++i) {
            if (ids[i] == ids[0] || ids[i] == ids[n_used - 1]) {
                ids[i] = n_ids + i; // an id of no bias, with a bias this is not used
            }
        }
        for (int i = 1; i < n_used - 1; i += 2) {
            ids[i] = -1; // another spelling of the same
        }
    }
    return ids;
}

// Tensors whose data are heap blocks of their own.
struct world {
    ggml_context * context = ggml_init({64 * ggml_tensor_overhead() + 4 * ggml_graph_overhead(), nullptr, true});
    std::vector<char *> blocks;
    std::vector<ggml_backend_buffer_t> buffers;

    ~world() {
        for (ggml_backend_buffer_t buffer : buffers) {
            ggml_backend_buffer_free(buffer);
        }
        for (char * data : blocks) {
            ::free(data);
        }
        ggml_free(context);
    }

    ggml_tensor * place(ggml_tensor * tensor) {
        const size_t size = ggml_nbytes(tensor);
        void * data = nullptr;
        GGML_ASSERT(posix_memalign(&data, 64, size) == 0);
        memset(data, 0xFF, size); // not numbers, so that an unwritten row is seen
        blocks.push_back((char *) data);
        buffers.push_back(ggml_backend_cpu_buffer_from_ptr(data, size));
        tensor->data = data;
        tensor->buffer = buffers.back();
        return tensor;
    }

    ggml_tensor * random(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2 = 1) {
        ggml_tensor * tensor = place(ggml_new_tensor_3d(context, type, ne0, ne1, ne2));
        std::normal_distribution<float> normal;
        std::vector<float> values(ggml_nelements(tensor));
        for (float & value : values) {
            value = normal(generator);
        }
        ggml_quantize_init(type);
        ggml_quantize_chunk(type, values.data(), tensor->data, 0, ne1 * ne2, ne0, nullptr);
        return tensor;
    }

    ggml_tensor * numbers(const std::vector<int32_t> & values, int64_t ne0) {
        ggml_tensor * tensor = place(ggml_new_tensor_2d(context, GGML_TYPE_I32, ne0, values.size() / ne0));
        memcpy(tensor->data, values.data(), ggml_nbytes(tensor));
        return tensor;
    }

    // flagged where ids are skipped: unflagged nodes have kernels of their own
    ggml_tensor * product_of(ggml_tensor * as, ggml_tensor * b, ggml_tensor * ids, pattern skipped) {
        ggml_tensor * product = place(ggml_mul_mat_id(context, as, b, ids));
        ggml_mul_mat_id_set_skip(product, skipped != NONE);
        return product;
    }

    std::vector<float> on_cpu(ggml_tensor * result) {
        ggml_cgraph * graph = ggml_new_graph(context);
        ggml_build_forward_expand(graph, result);
        ggml_cplan plan = ggml_graph_plan(graph, 1, nullptr);
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data = work.data();
        GGML_ASSERT(ggml_graph_compute(graph, &plan) == GGML_STATUS_SUCCESS);
        std::vector<float> values = row_of(GGML_TYPE_F32, result->data, ggml_nelements(result));
        memset(result->data, 0xFF, ggml_nbytes(result));
        return values;
    }
};

// The normalised mean squared error, and whether rows that are expected to be zero are.
static void compare(const ggml_tensor * found, const std::vector<float> & expected, double limit, const std::string & name) {
    double error = 0, norm = 0;
    bool zeros = true;
    const std::vector<float> values = row_of(GGML_TYPE_F32, found->data, ggml_nelements(found));
    for (size_t i = 0; i < values.size(); ++i) {
        error += (values[i] - expected[i]) * double(values[i] - expected[i]);
        norm += expected[i] * double(expected[i]);
        zeros = zeros && (expected[i] != 0 || values[i] == 0);
    }
    const double nmse = norm == 0 ? error : error / norm; // all zeros expected: the error itself
    report(zeros && nmse <= limit, "%s: error %.1e%s", name.c_str(), nmse, zeros ? "" : ", a skipped row is not zero");
}

// Both sides round activations to 8 bits, each in its own blocks; q4_0 on CUDA also its sums to half.
static double limit_of(ggml_type type) { return ggml_is_quantized(type) ? 2e-3 : 1e-5; }

struct sizes {
    int n_as = 3, n_ids = 8, n_used = 4, n_in = 512, n_out = 8;
};

// Without skipped slots a token has no more experts than there are matrices.
static int used(const sizes & n, pattern skipped) { return skipped == NONE ? n.n_as : n.n_used; }

static std::string name_of(const char * path, ggml_type type, int n_tokens, pattern skipped, const char * more = "") {
    return std::string(path) + " " + ggml_type_name(type) + ", " + std::to_string(n_tokens) + " tokens, " +
           pattern_names[skipped] + " skipped" + more;
}

// The whole operation: the path is chosen by type and number of tokens, as on a device.
static void check_op(const char * path, ggml_type type, int n_tokens, bool broadcast, pattern skipped) {
    const sizes n;
    world w;
    ggml_backend_cuda_context ctx(0);
    ggml_tensor * as = w.random(type, n.n_in, n.n_out, n.n_as);
    const int n_used = used(n, skipped);
    ggml_tensor * b = w.random(GGML_TYPE_F32, n.n_in, broadcast ? 1 : n_used, n_tokens);
    ggml_tensor * ids = w.numbers(random_ids(n.n_as, n.n_ids, n_used, n_tokens, skipped), n_used);
    ggml_tensor * product = w.product_of(as, b, ids, skipped);
    const std::vector<float> expected = w.on_cpu(product);
    ggml_cuda_mul_mat_id(ctx, product);
    compare(product, expected, limit_of(type), name_of(path, type, n_tokens, skipped, broadcast ? ", broadcast" : ""));
}

// The fused forms of decode: (x + bias) and glu(gate + gate bias, x + bias); bias rows for every id.
static void check_fused(ggml_type type, int n_tokens, bool with_bias, bool with_gate, pattern skipped) {
    const sizes n;
    const int n_used = used(n, skipped);
    world w;
    ggml_backend_cuda_context ctx(0);
    ggml_tensor * as = w.random(type, n.n_in, n.n_out, n.n_as);
    ggml_tensor * gate = w.random(type, n.n_in, n.n_out, n.n_as);
    ggml_tensor * bias = w.random(GGML_TYPE_F32, n.n_out, n.n_ids);
    ggml_tensor * gate_bias = w.random(GGML_TYPE_F32, n.n_out, n.n_ids);
    ggml_tensor * b = w.random(GGML_TYPE_F32, n.n_in, 1, n_tokens);
    std::vector<int32_t> numbers = random_ids(n.n_as, n.n_ids, n_used, n_tokens, skipped);
    for (int32_t & id : numbers) {
        id = uint32_t(id) < uint32_t(n.n_ids) ? id : n.n_ids - 1; // within the bias; ids of skipped slots may repeat
    }
    ggml_tensor * ids = w.numbers(numbers, n_used);

    ggml_tensor * out = w.product_of(as, b, ids, skipped);
    ggml_cuda_mm_fusion_args_host fusion{};
    if (with_bias) {
        out = w.place(ggml_add_id(w.context, out, bias, ids));
        fusion.x_bias = bias;
    }
    if (with_gate) {
        ggml_tensor * gated = w.product_of(gate, b, ids, skipped);
        fusion.gate = gate;
        if (with_bias) {
            gated = w.place(ggml_add_id(w.context, gated, gate_bias, ids));
            fusion.gate_bias = gate_bias;
        }
        out = w.place(ggml_swiglu_split(w.context, gated, out));
        fusion.glu_op = GGML_GLU_OP_SWIGLU;
    }
    const std::vector<float> expected = w.on_cpu(out);
    if (ggml_is_quantized(type)) {
        ggml_cuda_mul_mat_vec_q(ctx, as, b, ids, out, &fusion);
    } else {
        ggml_cuda_mul_mat_vec_f(ctx, as, b, ids, out, &fusion);
    }
    const std::string more = std::string(with_bias ? ", bias" : "") + (with_gate ? ", gate" : "");
    compare(out, expected, limit_of(type), name_of("fused", type, n_tokens, skipped, more.c_str()));
}

static void check_mmvf(ggml_type type, int n_tokens, pattern skipped) {
    const sizes n;
    const int n_used = used(n, skipped);
    world w;
    ggml_backend_cuda_context ctx(0);
    ggml_tensor * as = w.random(type, n.n_in, n.n_out, n.n_as);
    ggml_tensor * b = w.random(GGML_TYPE_F32, n.n_in, n_used, n_tokens);
    ggml_tensor * ids = w.numbers(random_ids(n.n_as, n.n_ids, n_used, n_tokens, skipped), n_used);
    ggml_tensor * product = w.product_of(as, b, ids, skipped);
    const std::vector<float> expected = w.on_cpu(product);
    ggml_cuda_mul_mat_vec_f(ctx, as, b, ids, product);
    compare(product, expected, limit_of(type), name_of("mmvf", type, n_tokens, skipped));
}

// mm_ids_helper: for each expert the slots that select it, in order; what lies beside them stays as it was.
static void check_ids(int n_used, bool inverse, pattern skipped) {
    const int n_as = n_used + 1, n_ids = 3 * n_used + 1, n_tokens = 37, n_slots = n_used * n_tokens;
    const int32_t untouched = 0x55555555;
    const std::vector<int32_t> ids = random_ids(n_as, n_ids, n_used, n_tokens, skipped);
    std::vector<int32_t> to_src1(n_slots, untouched), to_dst(n_slots, untouched), bounds(n_as + 1, untouched);
    ggml_cuda_launch_mm_ids_helper(ids.data(), to_src1.data(), to_dst.data(), bounds.data(), n_as, n_tokens, n_used,
                                   /*nchannels_y=*/n_used, /*si1=*/n_used, /*sis1=*/n_used, inverse, nullptr);

    std::vector<int32_t> src1(n_slots, untouched), dst(n_slots, untouched), ends = {0};
    int n = 0;
    for (int expert = 0; expert < n_as; ++expert) {
        for (int slot = 0; slot < n_slots; ++slot) {
            if (ids[slot] == expert) {
                (inverse ? src1[slot] : src1[n]) = inverse ? n : slot;
                dst[n++] = slot;
            }
        }
        ends.push_back(n);
    }
    report(src1 == to_src1 && dst == to_dst && ends == bounds, "mm_ids_helper, %d experts a token, %s, %s skipped: %d of %d slots",
           n_used, inverse ? "inverse" : "forward", pattern_names[skipped], n, n_slots);
}

// The native FP4 form of MMQ is chosen on Blackwell only: its quantise kernel alone, scattered rows against gathered ones.
static void check_mxfp4(pattern skipped) {
    const sizes n;
    const int n_tokens = 9, n_used = used(n, skipped), n_slots = n_tokens * n_used;
    const std::vector<int32_t> ids = random_ids(n.n_as, n.n_ids, n_used, n_tokens, skipped);
    std::vector<int32_t> forward(n_slots, 0), inverse(n_slots, -1);
    int n_rows = 0;
    for (int slot = 0; slot < n_slots; ++slot) {
        if (uint32_t(ids[slot]) < uint32_t(n.n_as)) {
            forward[n_rows] = slot / n_used;
            inverse[slot] = n_rows++;
        }
    }
    world w;
    const ggml_tensor * x = w.random(GGML_TYPE_F32, n.n_in, n_tokens);
    const float * values = (const float *) x->data;
    std::vector<char> gathered(n_slots * n.n_in / QK_FP4_MMQ * sizeof(block_fp4_mmq), 0x55), scattered(gathered);
    quantize_mmq_fp4_cuda(values, forward.data(), gathered.data(), nullptr, GGML_TYPE_MXFP4, false, n.n_in, n.n_in, n.n_in * n_tokens,
                          n.n_in * n_tokens, n.n_in, n_slots, 1, 1, nullptr);
    quantize_scatter_mmq_fp4_cuda(values, inverse.data(), scattered.data(), nullptr, GGML_TYPE_MXFP4, false, n.n_in, n.n_in, n.n_in,
                                  n_tokens, n_slots, n_used, nullptr);
    for (size_t i = 0; i < gathered.size(); ++i) { // columns beyond are of no use
        gathered[i] = int64_t(i / sizeof(block_fp4_mmq)) % n_slots < n_rows ? gathered[i] : 0x55;
    }
    const bool written = std::any_of(gathered.begin(), gathered.end(), [](char c) { return c != 0x55; });
    report(gathered == scattered && written == (n_rows > 0), "quantise mxfp4, %s skipped: %d of %d slots", pattern_names[skipped], n_rows,
           n_slots);
}

int main(int argc, char ** argv) {
    const ggml_type decode_types[] = {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K};
    const auto is_wanted = [&](const char * path) { return argc < 2 || strcmp(argv[1], path) == 0; };
    for (const pattern skipped : {NONE, SOME, ALL}) {
        if (argc > 2 && strcmp(argv[2], pattern_names[skipped]) != 0) {
            continue;
        }
        if (is_wanted("ids")) {
            for (const int n_used : {1, 2, 3, 4, 6, 8, 10, 16, 32}) { // 1 and 3: the form for any number
                check_ids(n_used, false, skipped);
                check_ids(n_used, true, skipped);
            }
        }
        if (is_wanted("mmvq")) {
            for (const ggml_type type : decode_types) {
                for (const int n_tokens : {1, 2, 5, 8}) {
                    check_op("mmvq", type, n_tokens, n_tokens % 2 == 1, skipped);
                }
            }
        }
        if (is_wanted("mmvf")) {
            for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32}) {
                for (const int n_tokens : {1, 2, 5, 8}) {
                    check_mmvf(type, n_tokens, skipped);
                }
            }
        }
        if (is_wanted("fused")) {
            for (const ggml_type type : {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, GGML_TYPE_F16}) {
                for (const int n_tokens : {1, 4}) {
                    if (n_tokens > 1 && !ggml_is_quantized(type)) {
                        continue; // not fused in the backend either
                    }
                    check_fused(type, n_tokens, true, false, skipped);
                    check_fused(type, n_tokens, false, true, skipped);
                    check_fused(type, n_tokens, true, true, skipped);
                }
            }
        }
        if (is_wanted("mmq")) {
            for (const ggml_type type : decode_types) {
                for (const bool broadcast : {false, true}) {
                    check_op("mmq", type, 19, broadcast, skipped);
                }
            }
            check_op("mmq", GGML_TYPE_Q2_K, 19, true, skipped);
            check_mxfp4(skipped);
        }
        if (is_wanted("sorted")) {
            check_op("sorted", GGML_TYPE_F16, 3, false, skipped);
            check_op("sorted", GGML_TYPE_F32, 19, true, skipped);
        }
    }
    printf("%s\n", all_right ? "all right" : "something is wrong");
    return all_right ? 0 : 1;
}
