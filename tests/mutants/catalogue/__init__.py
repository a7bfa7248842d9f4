# SPDX-License-Identifier: Apache-2.0
"""The mutants of this project, by area."""

from tests.mutants.catalogue.backend import BACKEND
from tests.mutants.catalogue.boundaries import BOUNDARIES
from tests.mutants.catalogue.bridge import BRIDGE, GRIDS
from tests.mutants.catalogue.checkpoints import CHECKPOINTS
from tests.mutants.catalogue.data import DATA
from tests.mutants.catalogue.encoder_cp import ENCODER_CP
from tests.mutants.catalogue.exchange import EXCHANGE
from tests.mutants.catalogue.exported import EXPORTED
from tests.mutants.catalogue.faults import FAULTS
from tests.mutants.catalogue.files import FILES
from tests.mutants.catalogue.frozen import FROZEN
from tests.mutants.catalogue.groups import GROUPS
from tests.mutants.catalogue.imported import IMPORTED
from tests.mutants.catalogue.imported_sounds import IMPORTED_SOUNDS
from tests.mutants.catalogue.imported_towers import IMPORTED_TOWERS
from tests.mutants.catalogue.levels import LEVELS
from tests.mutants.catalogue.lossy import LOSSY
from tests.mutants.catalogue.memory import MEMORY
from tests.mutants.catalogue.model import MODEL
from tests.mutants.catalogue.options import OPTIONS
from tests.mutants.catalogue.overlap import OVERLAP
from tests.mutants.catalogue.planned import PLANNED
from tests.mutants.catalogue.routing import ROUTING
from tests.mutants.catalogue.sequence import ATTENTION, SHARDING
from tests.mutants.catalogue.stages import STAGES
from tests.mutants.catalogue.torch_native import TORCH_NATIVE
from tests.mutants.catalogue.torch_native_inside import TORCH_NATIVE_INSIDE
from tests.mutants.catalogue.training import (
    EXPERTS,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
)
from tests.mutants.catalogue.two_encoders import TWO_ENCODERS
from tests.mutants.catalogue.written_without_a import WITHOUT_A
from tests.mutants.catalogue.written_without_a_model import WITHOUT_A_MODEL
from tests.mutants.catalogue.written_without_a_parts import WITHOUT_A_PARTS
from tests.mutants.catalogue.written_without_b_checkpoints import WITHOUT_B_CHECKPOINTS
from tests.mutants.catalogue.written_without_b_jobs import WITHOUT_B_JOBS
from tests.mutants.catalogue.written_without_b_memory import WITHOUT_B_MEMORY
from tests.mutants.catalogue.written_without_b_optimizer import WITHOUT_B_OPTIMIZER
from tests.mutants.catalogue.written_without_b_training import WITHOUT_B_TRAINING
from tests.mutants.catalogue.written_without_c import WITHOUT_C
from tests.mutants.catalogue.written_without_c_more import WITHOUT_C_MORE
from tests.mutants.catalogue.written_without_d import WITHOUT_D
from tests.mutants.catalogue.written_without_d_jobs import WITHOUT_D_JOBS
from tests.mutants.catalogue.written_without_d_parts import WITHOUT_D_PARTS
from tests.mutants.catalogue.written_without_e import WITHOUT_E
from tests.mutants.catalogue.written_without_e_jobs import WITHOUT_E_JOBS
from tests.mutants.catalogue.written_without_e_parts import WITHOUT_E_PARTS
from tests.mutants.catalogue.written_without_f import WITHOUT_F
from tests.mutants.catalogue.written_without_f_more import WITHOUT_F_MORE

MUTANTS = (
    *GRIDS,
    *GROUPS,
    *BRIDGE,
    *ROUTING,
    *EXCHANGE,
    *ENCODER_CP,
    *SHARDING,
    *ATTENTION,
    *MODEL,
    *WEIGHTS,
    *GRADIENTS,
    *EXPERTS,
    *OPTIMIZER,
    *CHECKPOINTS,
    *FILES,
    *STAGES,
    *LEVELS,
    *FROZEN,
    *MEMORY,
    *OVERLAP,
    *TWO_ENCODERS,
    *FAULTS,
    *BACKEND,
    *BOUNDARIES,
    *OPTIONS,
    *PLANNED,
    *IMPORTED,
    *IMPORTED_SOUNDS,
    *IMPORTED_TOWERS,
    *EXPORTED,
    *DATA,
    *TORCH_NATIVE_INSIDE,
    *TORCH_NATIVE,
    *LOSSY,
    *WITHOUT_A,
    *WITHOUT_A_MODEL,
    *WITHOUT_A_PARTS,
    *WITHOUT_B_CHECKPOINTS,
    *WITHOUT_B_JOBS,
    *WITHOUT_B_MEMORY,
    *WITHOUT_B_OPTIMIZER,
    *WITHOUT_B_TRAINING,
    *WITHOUT_C,
    *WITHOUT_C_MORE,
    *WITHOUT_D,
    *WITHOUT_D_PARTS,
    *WITHOUT_D_JOBS,
    *WITHOUT_E,
    *WITHOUT_E_PARTS,
    *WITHOUT_E_JOBS,
    *WITHOUT_F,
    *WITHOUT_F_MORE,
)
