// Greedy generation with llama.cpp's library alone, small enough to be compiled for any CPU.
//
//   greedy MODEL N TOKEN...     the prompt in one batch, then N tokens one by one
//
// Standard output: int32 [N] the tokens generated; float32 [n_token + N, n_vocab] the logits after each token of the
// prompt and of the answer. Standard error: llama.cpp's log, and the features of the CPU.

#include "ggml-backend.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s MODEL N TOKEN...\n", argv[0]);
        return 2;
    }
    const int n_predict = atoi(argv[2]);
    const int n_prompt  = argc - 3;

    ggml_backend_load_all(); // where kernels lie in libraries of their own, beside the program
    fprintf(stderr, "%s\n", llama_print_system_info());
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx     = n_prompt + n_predict;
    params.n_batch   = params.n_ubatch        = n_prompt;
    params.n_threads = params.n_threads_batch = 1;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        return 1;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    llama_batch batch = llama_batch_init(n_prompt, 0, 1);
    const auto add = [&](llama_token token, int pos) {
        const int i = batch.n_tokens++;
        batch.token[i]     = token;
        batch.pos[i]       = pos;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = true;
    };
    for (int i = 0; i < n_prompt; ++i) {
        add(atoi(argv[3 + i]), i);
    }

    std::vector<llama_token> tokens;
    std::vector<float>       logits;
    for (int i = 0; i <= n_predict; ++i) {
        if (llama_decode(ctx, batch)) {
            return 1;
        }
        const float * data = llama_get_logits(ctx);
        logits.insert(logits.end(), data, data + (size_t) batch.n_tokens*n_vocab);
        if (i < n_predict) {
            tokens.push_back(std::max_element(logits.end() - n_vocab, logits.end()) - (logits.end() - n_vocab));
            batch.n_tokens = 0;
            add(tokens.back(), n_prompt + i);
        }
    }
    fwrite(tokens.data(), sizeof(llama_token), tokens.size(), stdout);
    fwrite(logits.data(), sizeof(float), logits.size(), stdout);

    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
}
