"""The tests of ``make test-fast``: the most telling ones of every room, in under two minutes on two cores.

conftest.py gives the marker ``slow`` to every other test. A file maps to a regular expression, which is
searched in the names of its tests with their parameters, such as ``test_matches_oracle[cpu-decode]``.
"""

from __future__ import annotations

ALL = ""

FAST: dict[str, str] = {
    # plan, ops, cache, layers, generation
    "plan/test_plan.py": ALL,
    "plan/test_methods.py": r"uncached.*\[(vanilla|fusedkv|skipv1|cla|resformer)-(grouped|latent)\]",
    "ops/test_reference.py": ALL,
    "ops/test_criterion.py": ALL,
    "ops/test_dense.py": ALL,
    "ops/test_merging.py": ALL,
    "ops/test_scores.py": r"test_matches_oracle\[(cpu|simt1)-(warp|block_16|fallback)-",
    "ops/test_score_attention.py": r"test_matches_oracle|zeros",
    "ops/test_lse_gradient.py": r"oracle\[(self|window)|merged",
    "ops/test_attn_mask.py": r"test_matches_oracle\[|named",
    "ops/test_kvcache_args.py": r"test_.*\[cpu-(warp|one|many)|named",
    "ops/test_flash_callers.py": r"\[?cpu",
    "ops/test_slot_mapping.py": r"\[cpu",
    "ops/test_head_loss.py": r"chunk|bad_arguments",
    "ops/test_explain.py": r"by_hand|errors|what_runs",
    "ops/test_fuse_kv.py": r"(test_matches_oracle|test_gradients_match)\[cpu|gradcheck_in_float64\[cpu",
    "ops/test_attn_func.py": r"(test_matches_oracle|test_gradients_match)\[cpu",
    "ops/test_varlen.py": r"test_matches_oracle|separate|takes|named",
    "ops/test_attn_with_kvcache.py": r"test_matches_oracle\[cpu|paged_equals|causal_is|same_rows\[cpu",
    "ops/test_attn_kernels.py": r"test_matches_oracle\[simt1|sums?_of_costs",
    "ops/test_append_kvcache.py": r"oracle.*\[(cpu|simt1)",
    "ops/test_bad_calls.py": r"error_names_the_argument",
    "ops/test_compile.py": r"fakes",
    "cache/test_cache.py": ALL,
    "cache/test_codec.py": ALL,
    "layers/test_fusion.py": ALL,
    "layers/test_attention.py": r"what_the_plan_says.*[-\[](fusedkv|skipv1|yoco|cla|resformer)[-\]]",
    "layers/test_mla.py": r"every_plan_is_its_equations.*[-\[](fusedkv|skipv1)[-\]]|refused|bad_c",
    "layers/test_moe.py": r"equal_experts|balance_loss_is|pieces",
    "layers/test_decoder.py": r"left_padded.*[-\[]fusedkv[-\]]|cannot_be|names_are|loss_is.*\[fusedkv\]",
    "generation/test_generate.py": r"greedy_tokens.*[-\[](fusedkv|skipv1)[-\]]|sampling|stop|cannot_be",
    "generation/test_cuda_graph.py": r"same_tokens_with_every_plan.*[-\[](fusedkv|skipv1)[-\]]|noticed",
    # checkpoint, distributed, training, evaluation
    "checkpoint/test_checkpoint.py": r"bits_survive.*[-\[](fusedkv|skipv1)[-\]]|flipped|dtypes|do_not_fit",
    "distributed/test_parallel_tensor.py": r"order_of_heads|orders_of",
    "distributed/test_parallel_fsdp.py": r"layout",
    "distributed/test_distributed.py": r"one_process_makes|half_an",
    "training/test_configs.py": ALL,
    "training/test_data.py": ALL,
    "training/test_saving.py": r"flipped|format|holds",
    "training/test_train.py": r"bit_for_bit\[change0|clipping|wrong_settings|cosine|toml|every_key",
    "evaluation/test_eval.py": r"buckets|uniform|target|strided|wrong",
    "evaluation/test_retrieval.py": r"named|plain_forward",
    # hf, conversion
    "hf/test_hf_config.py": ALL,
    "hf/test_hf_cache.py": r"hold",
    "hf/test_hf_from_decoder.py": r"logits.*(qwen3|biases)-(fusedkv|skipv1)\]|bytes|refused",
    "hf/test_hf_coded_cache.py": r"by_token.*(int8|kivi|turboquant)-llama|readers|into_a_group|formula",
    "hf/test_hf_coded_folders.py": r"do_not_fit|cast|windows?_stay|drops",
    "hf/test_hf_models.py": r"gives_the_same_logits\[(fusedkv|skipv1)\]|own_decoder",
    "hf/test_hf_generate.py": r"greedy_with.*[-\[]fusedkv[-\]]",
    "hf/test_hf_training.py": r"lacks|bit_by_bit.*[-\[]fusedkv[-\]]",
    "conversion/test_hf_moments.py": ALL,
    "conversion/test_hf_solve.py": ALL,
    "conversion/test_hf_pooling.py": ALL,
    "conversion/test_hf_convert.py": r"vanilla|identical|refused|nearer.*\[fusedkv-llama",
    "conversion/test_hf_distill.py": ALL,
    "conversion/test_coding.py": r"(cost|plain_logits).*\[(fusedkv|patchwork)|damaged|need",
    "serving/test_vllm_config.py": ALL,
    # lab, benchmarks, command line
    "lab/test_compare.py": r"labels|options|paired|verdicts|front|names",
    "lab/test_plan_cluster.py": r"rows_are|mistakes|read",
    "lab/test_probe.py": r"weights|known|sizes",
    "lab/test_grads.py": r"by_hand",
    "benchmarks/test_bench.py": r"goals_take|wrong_peer",
    "benchmarks/test_regression_guard.py": r"sees|tenth",
    "cli/test_compress.py": r"bad_input",
    "cli/test_cli.py": r"plan|keys|explains_itself|right_exit_code|summaries",
    # the executor, the documents, the house
    "simt/test_simt.py": ALL,
    "docs/test_readme.py": r"links|picture|targets|parse|python_blocks.*README",
    "docs/test_examples.py": r"runs.*quickstart|kind|package",
    "project/test_house.py": ALL,
    "project/test_version.py": ALL,
    "project/test_import.py": r"changes_no_setting",
    "project/test_install.py": r"named|sentence",
}
