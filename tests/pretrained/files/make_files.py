"""Makes the files of this folder. Run with torch 2.13 and torchvision 0.28: `python make_files.py`."""

import json
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

# A wheel from another index than torch's comes without its compiled operators; the classification models need none.
torch.library.register_fake = lambda *args, **kwargs: lambda function: function
import torchvision  # noqa: E402

HERE = Path(__file__).parent


def state_dict() -> OrderedDict:
    """Every dtype of weights, and views that do not start at, or do not follow, their storage's order."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 5))
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = network.state_dict()
    state['parameter'] = torch.nn.Parameter(torch.randn(3))
    state['base'] = base
    state['transposed'] = base.T
    state['offset_view'] = base[1:3, 2:5]
    state['every_second'] = base[:, ::2]
    state['scalar'] = torch.tensor(3.5)
    state['empty'] = torch.zeros(0, 7)
    for dtype in ('float64', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool', 'complex64'):
        state[dtype] = (torch.arange(6).reshape(2, 3) * 1.25).to(getattr(torch, dtype))
    return state


def expected(state: dict) -> dict[str, np.ndarray]:
    return {
        name: (tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()).numpy()
        for name, tensor in state.items()
    }


def legacy_window(path: Path) -> None:
    """A legacy file whose storage is a window of another one, as torch 0.3 and older wrote shared storages.

    No torch of today writes these, so the persistent id is rewritten on its way into the pickle.
    """
    whole = torch.arange(10, dtype=torch.float32)
    keys: list[str] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, torch.storage.TypedStorage):
                keys.append('7')
                return ('storage', torch.FloatStorage, '7', 'cpu', 10, ('8', 4, 6))
            return None

    with open(path, 'wb') as file:
        for header in (
            0x1950A86A20F9469CFC6C,
            1001,
            {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}},
        ):
            pickle.dump(header, file, protocol=2)
        Pickler(file, protocol=2).dump({'window': whole[1:3]})
        pickle.dump(keys, file, protocol=2)
        file.write(struct.pack('<q', 10) + whole.numpy().tobytes())
    np.testing.assert_array_equal(torch.load(path, weights_only=False)['window'].numpy(), [5, 6])


def main() -> None:
    state = state_dict()
    torch.save(state, HERE / 'zip.pth')
    torch.save({'epoch': 3, 'best': 91.5, 'state_dict': state}, HERE / 'zip_protocol4.pt', pickle_protocol=4)
    torch.save({'epoch': 3, 'state_dict': state}, HERE / 'legacy.th', _use_new_zipfile_serialization=False)
    torch.save(
        {'f8': torch.arange(4).to(torch.float8_e4m3fn), 'u16': torch.arange(3).to(torch.uint16)}, HERE / 'v3.pth'
    )
    legacy_window(HERE / 'legacy_window.th')
    np.savez_compressed(HERE / 'expected.npz', **expected(state))
    names = {
        name: {key: list(tensor.shape) for key, tensor in getattr(torchvision.models, name)().state_dict().items()}
        for name in ('resnet18', 'resnet50', 'mobilenet_v2')
    }
    (HERE / 'torchvision_names.json').write_text(json.dumps(names, separators=(',', ':')) + '\n')


if __name__ == '__main__':
    main()
