"""Pretrain a tiny base, adapt all of its experts with LoRA, and export with a proof: python examples/lora_export.py [FOLDER]"""

import sys
from pathlib import Path

import moe_train

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/lora")
tokenizer = folder / "tokenizer"
if not tokenizer.exists():
    moe_train.train_tokenizer(Path("LICENSE").read_text().splitlines(), 384, tokenizer)

# The base: pretrained, and exported as files that transformers loads.
base = moe_train.load_config("examples/tiny.yaml", [f"run_dir={folder}/base", f"data.tokenizer.path={tokenizer}"])
moe_train.train_run(moe_train.resolve(base))
moe_train.export(folder / "base", folder / "base-hf")

# The adapters: two factors beside each projection of attention and experts, trained on the README.
changes = [
    f"run_dir={folder}/lora",
    f"init_from={folder}/base-hf",
    "model=null",
    "data.train=[{name: files, files: [README.md], record: {name: text}}]",
    "lora={targets: [{modules: ['attention.*_proj', 'ffn.*_proj'], rank: 4, alpha: 8}]}",
]
lora = moe_train.load_config("examples/tiny.yaml", [*changes, f"data.tokenizer.path={tokenizer}"])
moe_train.train_run(moe_train.resolve(lora))

# The export: each file is read back by an independent reader and compared with the trained weights.
moe_train.export(folder / "lora", folder / "adapter", "peft")
moe_train.export(folder / "lora", folder / "merged-hf", merge=True)
for directory in ("adapter", "merged-hf"):
    _, checks = moe_train.verify(folder / directory)
    for check in checks:
        result = {True: "ok", False: "FAILED", None: "not checked"}[check.passed]
        print(f"{directory}: {result} {check.name}")
