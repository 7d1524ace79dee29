"""The part of sentencepiece's model file that is read or written here, as a protobuf message.

sentencepiece comes with a Python module for it, but that was generated for one release of
protobuf and refuses to load with older ones, which other packages may need. A message declared
at run time goes with any. What is not declared here is kept as it is when a model is written
again. The numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

from functools import cache
from typing import Any

# Types of pieces, and kinds of models.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2

# Each field: name, number, protobuf's type, and the value where a file has none.
_PIECE = (("piece", 1, "STRING", ""), ("score", 2, "FLOAT", ""), ("type", 3, "INT32", "1"))
_TRAINER = (
    ("model_type", 3, "INT32", "1"),
    ("byte_fallback", 35, "BOOL", "false"),
    ("unk_id", 40, "INT32", "0"),
    ("bos_id", 41, "INT32", "1"),
    ("eos_id", 42, "INT32", "2"),
    ("pad_id", 43, "INT32", "-1"),
    ("unk_piece", 45, "STRING", "<unk>"),
    ("bos_piece", 46, "STRING", "<s>"),
    ("eos_piece", 47, "STRING", "</s>"),
    ("pad_piece", 48, "STRING", "<pad>"),
)
_NORMALIZER = (
    ("name", 1, "STRING", ""),
    ("precompiled_charsmap", 2, "BYTES", ""),
    ("add_dummy_prefix", 3, "BOOL", "true"),
    ("remove_extra_whitespaces", 4, "BOOL", "true"),
)


def new_model_proto() -> Any:
    """Return an empty ``ModelProto``."""
    return _model_class()()


@cache
def _model_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model.proto", package="s", syntax="proto2")
    messages = (("Piece", _PIECE), ("Trainer", _TRAINER), ("Normalizer", _NORMALIZER))
    for name, fields in messages:
        message = file.message_type.add(name=name)
        for field, number, kind, default in fields:
            added = message.field.add(
                name=field,
                number=number,
                type=getattr(kinds, f"TYPE_{kind}"),
                label=kinds.LABEL_OPTIONAL,
            )
            if default:
                added.default_value = default
    model = file.message_type.add(name="Model")
    for field, number, name in (
        ("pieces", 1, "Piece"),
        ("trainer_spec", 2, "Trainer"),
        ("normalizer_spec", 3, "Normalizer"),
    ):
        model.field.add(
            name=field,
            number=number,
            type=kinds.TYPE_MESSAGE,
            type_name=f".s.{name}",
            label=kinds.LABEL_REPEATED if field == "pieces" else kinds.LABEL_OPTIONAL,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("s.Model"))
