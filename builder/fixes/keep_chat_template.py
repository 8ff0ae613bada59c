"""A chat template that was left behind."""

from builder.fixes.copied_files import CopiedFiles
from builder.fixes.fix import Fix

FILES = CopiedFiles(("*.jinja", "chat_template*"))

FIX = Fix(
    name="keep-chat-template",
    title="The chat template is the base's",
    symptom="Chat requests are refused, or prompts are put together without the base's marks.",
    upstream=(
        "nvidia-modelopt exports no tokenizer, and the published pipeline copied four files by name, "
        "chat_template.jinja not among them."
    ),
    healthy="The chat template is the base's, byte for byte, or neither has one in a file of its own.",
    detect=FILES.detect,
    apply=FILES.apply,
)
