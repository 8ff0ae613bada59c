"""An export template with few tokens that keeps the base's padding token."""

from builder.fixes.fix import NVFP4, Fix

FIX = Fix(
    name="template-token-ids",
    title="The export template has no padding token beyond its vocabulary",
    symptom="Building the template ends in the assertion “Padding_idx must be within num_embeddings”.",
    upstream=(
        "transformers and torch: a decoder's torch.nn.Embedding takes config.pad_token_id, which must be below "
        "vocab_size. bos_token_id and eos_token_id do no harm."
    ),
    schemes=NVFP4,
    avoided="No template is built: every model is made from the base's own config, vocabulary and token ids included.",
)
