#include "model/checkpoint/ignored.h"

#include <algorithm>
#include <cstddef>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace prefilld::model {
namespace {

// The log is to show every field of a usual file, but a file may have any number of tensors.
constexpr size_t kMaxFields = 64;
constexpr size_t kMaxTensors = 8;

std::string Listed(const std::vector<std::string>& names, size_t max) {
  const auto end = names.begin() + static_cast<std::ptrdiff_t>(std::min(names.size(), max));
  std::string text = absl::StrJoin(names.begin(), end, ", ");
  if (names.size() > max) absl::StrAppend(&text, ", ... (", names.size(), " in all)");
  return text;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> DescribeIgnored(
    const ModelConfig& config, const std::vector<std::string>& unused_tensors) {
  std::vector<std::pair<std::string, std::string>> ignored;
  if (!config.ignored_keys.empty()) {
    ignored.emplace_back("config_keys", Listed(config.ignored_keys, kMaxFields));
  }
  if (!unused_tensors.empty()) {
    ignored.emplace_back("tensors", Listed(unused_tensors, kMaxTensors));
  }
  return ignored;
}

void IgnoreInertFields(ConfigFields& fields) {
  // These say who saved the file, and how it is to be loaded.
  fields.Ignore({"_attn_implementation", "_attn_implementation_autoset", "_commit_hash",
                 "_flash_attn_2_enabled", "_name_or_path", "attn_implementation", "auto_map",
                 "dtype", "is_llama_config", "torch_dtype", "torchscript", "transformers.js_config",
                 "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16",
                 "use_flash_attention_2", "use_flash_attn"});
  // These matter in training alone.
  fields.Ignore({"attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop",
                 "finetuning_task", "gradient_checkpointing", "hidden_dropout", "initializer_range",
                 "neftune_noise_alpha", "pretraining_tp", "problem_type", "resid_pdrop",
                 "task_specific_params"});
  // These belong to the tokenizer. max_position_embeddings is the length that counts here.
  fields.Ignore({"bos_token_id", "cls_token_id", "decoder_start_token_id", "mask_token_id",
                 "max_seq_len", "max_sequence_length", "model_max_length", "pad_token_id",
                 "sep_token_id", "seq_length", "tokenizer_class", "unk_token_id"});
  // These are defaults of transformers' base class, which older files spell out.
  fields.Ignore({"bad_words_ids",
                 "begin_suppress_tokens",
                 "chunk_size_feed_forward",
                 "diversity_penalty",
                 "do_sample",
                 "early_stopping",
                 "encoder_no_repeat_ngram_size",
                 "exponential_decay_length_penalty",
                 "forced_bos_token_id",
                 "forced_eos_token_id",
                 "id2label",
                 "is_decoder",
                 "label2id",
                 "length_penalty",
                 "max_length",
                 "max_new_tokens",
                 "min_length",
                 "no_repeat_ngram_size",
                 "num_beam_groups",
                 "num_beams",
                 "num_return_sequences",
                 "output_attentions",
                 "output_hidden_states",
                 "output_scores",
                 "prefix",
                 "remove_invalid_values",
                 "repetition_penalty",
                 "return_dict",
                 "return_dict_in_generate",
                 "suppress_tokens",
                 "temperature",
                 "top_k",
                 "top_p",
                 "typical_p",
                 "use_cache"});
}

void IgnoreInertRopeFields(ConfigFields& fields) {
  fields.Ignore({"finetuned"});
  for (const char* name :
       {"attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor",
        "low_freq_factor", "mscale", "mscale_all_dim", "truncate"}) {
    if (!fields.WasRead(name)) fields.Ignore({name});
  }
}

}  // namespace prefilld::model
