"""What both builds of llama.cpp load: our GGUF export."""

from __future__ import annotations

from pathlib import Path

VARIANTS = ("f16", "Q8_0", "Q4_0")
MODEL_FILE = "model.gguf"


def write_float(hf_folder: Path, path: Path) -> None:
    """The weights of a Hugging Face folder in float16."""
    from glassgpt import gguf_writer
    from glassgpt.model import weights
    from glassgpt.text import Tokenizer

    gguf_writer.write(weights.load_hf(hf_folder).half(), Tokenizer.load(hf_folder), path, "random")


def write_rounded(hf_folder: Path, path: Path, variant: str) -> None:
    """The same with every matrix but the positions rounded by the `gguf` package, as `llama-quantize --pure` does."""
    import gguf

    plain = path.with_name("f16.gguf")
    write_float(hf_folder, plain)
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    kind = gguf.GGMLQuantizationType[variant]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{variant}"])
    for tensor in reader.tensors:
        if tensor.data.ndim == 2 and not tensor.name.startswith("position"):
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data.astype("float32"), kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain.unlink()
