"""The public functions of every op."""

# Some ops share their name with the file that defines them. Importing all of them eagerly makes
# sure that the package attribute is the function, whoever imports one of the files first.
from .add_sparse_rows import add_sparse_rows
from .dropout import dropout, dropout_
from .encode_derivative import decode_derivative, encode_derivative
from .fingerprint import fingerprint
from .low_rank import low_rank_down, low_rank_grad, low_rank_up, low_rank_up_
from .rebuild_input import rebuild_gelu, rebuild_layer_norm
from .shared_top_tau import shared_top_tau
from .sparse_adamw import AdamWEntry, sparse_adamw
from .sparse_norm_grad import sparse_norm_grad
from .sparse_weight_grad import sparse_weight_grad
from .squared_grad import accumulate_squared_grad, accumulate_squared_vector_grad
from .top_tau import top_tau
from .write_delta import gather_original, write_delta

__all__ = [
    "AdamWEntry",
    "accumulate_squared_grad",
    "accumulate_squared_vector_grad",
    "add_sparse_rows",
    "decode_derivative",
    "dropout",
    "dropout_",
    "encode_derivative",
    "fingerprint",
    "gather_original",
    "low_rank_down",
    "low_rank_grad",
    "low_rank_up",
    "low_rank_up_",
    "rebuild_gelu",
    "rebuild_layer_norm",
    "shared_top_tau",
    "sparse_adamw",
    "sparse_norm_grad",
    "sparse_weight_grad",
    "top_tau",
    "write_delta",
]
