"""Creates meshes one after another and stores what this rank sees of them, as rank_<r>.json.

Arguments: the folder for the results, a JSON list of ParallelConfig fields.
"""

import json
import pathlib
import sys

from telechat.parallel.mesh import KINDS, Mesh
from telechat.parallel.parallel_config import ParallelConfig

seen = []
for fields in json.loads(sys.argv[2]):
    mesh = Mesh.create(ParallelConfig(**fields))
    from telechat.parallel import collectives  # after the mesh: msrun's scheduler goes no further than it

    groups = {kind: getattr(mesh, kind) for kind in KINDS}
    seen.append({
        "describe": mesh.describe(), "coordinates": mesh.coordinates,
        "groups": {kind: [group.name, group.ranks, group.rank] for kind, group in groups.items()},
        # What the groups really connect: the global rank of each member, in its order.
        "members": {kind: collectives.gather_objects(mesh.rank, group) for kind, group in groups.items()}})
folder = pathlib.Path(sys.argv[1])
(folder / f"rank_{mesh.rank}.json").write_text(json.dumps(seen))
