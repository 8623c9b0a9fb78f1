"""The names of a module in different engines."""

import re

# Where transformers 5 and vLLM give a module another name than the checkpoint does.
_RENAMED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^(language_model\.lm_head|embed_out)$", "lm_head"),
        (r"^(?!model\.|language_model\.)(?=\w+\.)", "model."),
        (r"^fc$", "model.fc"),  # of an EAGLE draft: vLLM models/llama_eagle3.py
        (r"^model\.(?!layers\.|language_model\.)", ""),
    )
)


def spellings(module: str) -> list[str]:
    """Return the names of a module in different engines, the checkpoint's first.

    Ignored modules are matched by exact name, and multimodal wrappers differ in their prefixes.
    """
    return [module, *(pattern.sub(name, module) for pattern, name in _RENAMED if pattern.search(module))]
