"""Decoding with a paged cache: unequal prompts, one pool of pages, forks that share pages.

    python examples/paged_decode.py

A paged cache allocates memory page by page, as sequences grow. A contiguous cache allocates ``max_len`` slots
for every sequence at once. Both give the same tokens.
"""

import torch

import fusedkv_ext as fkv

torch.manual_seed(0)
PAGE_SIZE, MAX_LEN, NUM_PAGES = 16, 256, 24

config = fkv.DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    plan="fusedkv",
)
model = fkv.Decoder(config).eval()

# Four prompts of unequal length, padded on the left. The last column is the last token of every prompt.
lengths = [50, 3, 17, 32]
prompts = [torch.randint(256, (n,)) for n in lengths]
padded = torch.stack([torch.cat([torch.zeros(max(lengths) - len(p), dtype=torch.long), p]) for p in prompts])

# 24 pages of 16 tokens for all four sequences. At full length they would need 4 * 256 / 16 = 64 pages.
cache = model.make_cache(batch_size=4, max_len=MAX_LEN, page_size=PAGE_SIZE, num_pages=NUM_PAGES)

with torch.inference_mode():
    # Prefill. ``lengths`` says how many tokens of each row count. logits_to_keep=1 skips all other positions.
    logits = model(padded, cache=cache, lengths=lengths, logits_to_keep=1)
    new = []
    for _ in range(20):  # decode: one token for every sequence and step
        token = logits[:, -1].argmax(-1)
        new.append(token)
        logits = model(token[:, None], cache=cache)
tokens = torch.stack(new, dim=1)

# Token t of sequence b is in page block_table[b, t // page_size], slot t % page_size. Each sequence owns
# ceil(length / page_size) pages.
used = sum(-(-length // PAGE_SIZE) for length in cache.lengths)
assert cache.lengths == tuple(n + 20 for n in lengths)
assert cache.free_pages == NUM_PAGES - used
print(f"lengths {cache.lengths}: {used} pages in use, {cache.free_pages} free")

# The same tokens as generate(), one prompt at a time, with a contiguous cache.
for prompt, continuation in zip(prompts, tokens, strict=True):
    assert torch.equal(model.generate(prompt[None], max_new_tokens=20)[0, len(prompt) :], continuation)

# Fork: sequences 1 and 2 become copies of sequence 0, as in beam search. Copies share pages until one of
# them writes, so the fork itself takes no page.
free_before = cache.free_pages
cache.reorder([0, 0, 0, 3])
assert cache.lengths == (70, 70, 70, 52) and cache.free_pages > free_before

# A finished sequence gives its pages back. Sequence 3 owned 4 of them.
free_before = cache.free_pages
cache.free(3)
assert cache.free_pages == free_before + 4

# A step that does not fit raises CacheFullError, and the cache stays as it was.
try:
    cache.advance(MAX_LEN)
except fkv.CacheFullError as error:
    print(f"CacheFullError: {error}")
else:
    raise AssertionError("sequences of 70 tokens cannot take 256 more")
assert cache.lengths == (70, 70, 70, 0)
