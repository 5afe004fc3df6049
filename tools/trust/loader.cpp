// What llama.cpp does with files of strangers: one line of JSON for each GGUF that standard input names.
//
//   loader SECONDS < LIST     each file is loaded and decoded in a process of its own, which may crash
//
// {"file", "status": loaded | refused | undecoded | crashed | hung, "code", "peak_kib", "seconds"}; what the process says goes
// to FILE.log. `peak_kib` is all that the process has had in memory. Two files are mapped, the next two read.

#include "llama.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <new>
#include <string>
#include <vector>

// As without a sanitizer, whose own operator ends the program: what is too large is refused.
void * operator new(size_t size) {
    if (void * found = malloc(size ? size : 1)) {
        return found;
    }
    throw std::bad_alloc();
}
void operator delete(void * p) noexcept { free(p); }
void operator delete(void * p, size_t) noexcept { free(p); }

using Clock = std::chrono::steady_clock;

enum Status { LOADED, REFUSED, UNDECODED };

static bool decode(llama_context * ctx, int n_vocab, int n, llama_pos start) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    for (int i = 0; i < n; ++i) {
        batch.token[i]     = (37*(start + i) + 5) % n_vocab;
        batch.pos[i]       = start + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = true;
    }
    batch.n_tokens = n;
    const bool done = llama_decode(ctx, batch) == 0;
    if (done) {
        volatile float last = llama_get_logits_ith(ctx, n - 1)[n_vocab - 1];
        (void) last;
    }
    llama_batch_free(batch);
    return done;
}

static Status load(const char * file, bool mapped) {
    llama_model_params model_params = llama_model_default_params();
    model_params.load_mode = mapped ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    llama_model * model = llama_model_load_from_file(file, model_params);
    if (!model) {
        return REFUSED;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx     = 64;
    params.n_batch   = params.n_ubatch        = 32;
    params.n_threads = params.n_threads_batch = 1;
    llama_context * ctx = llama_init_from_model(model, params);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    Status status = UNDECODED;
    if (ctx && n_vocab > 0 && decode(ctx, n_vocab, 32, 0) && decode(ctx, n_vocab, 1, 32)) {
        status = LOADED;
    }
    llama_free(ctx);
    llama_model_free(model);
    return status;
}

static pid_t start(const std::string & file, bool mapped) {
    const pid_t child = fork();
    if (child == 0) {
        const int log = open((file + ".log").c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0644);
        dup2(log, 1);
        dup2(log, 2);
        const Status status = load(file.c_str(), mapped);
        fflush(nullptr);
        _exit(status);
    }
    return child;
}

int main(int argc, char ** argv) {
    const double patience = argc > 1 ? atof(argv[1]) : 60;
    llama_backend_init();
    std::string file;
    for (int number = 0; std::getline(std::cin, file); ++number) {
        const auto   before = Clock::now();
        const pid_t  child  = start(file, number / 2 % 2 == 0);
        const auto   passed = [&] { return std::chrono::duration<double>(Clock::now() - before).count(); };
        int          state  = 0;
        bool         hung   = false;
        struct rusage used  = {};
        while (wait4(child, &state, WNOHANG, &used) == 0) {
            usleep(1000);
            if (!hung && passed() > patience) {
                hung = true;
                kill(child, SIGKILL);
            }
        }
        static const char * const names[] = { "loaded", "refused", "undecoded" };
        const bool   crashed = WIFSIGNALED(state) || WEXITSTATUS(state) > UNDECODED;
        const char * status  = hung ? "hung" : crashed ? "crashed" : names[WEXITSTATUS(state)];
        printf("{\"file\": \"%s\", \"status\": \"%s\", \"code\": %d, \"peak_kib\": %ld, \"seconds\": %.3f}\n", file.c_str(), status,
               WIFSIGNALED(state) ? -WTERMSIG(state) : WEXITSTATUS(state), used.ru_maxrss, passed());
        fflush(stdout);
    }
}
