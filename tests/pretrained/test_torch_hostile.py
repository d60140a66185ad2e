"""Hostile and damaged torch files: no code runs, no absurd size takes memory, and the error is one line."""

import contextlib
import copy
import copyreg
import gzip
import io
import os
import pickle
import random
import runpy
import subprocess
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from pickle_assembler import (
    call,
    function,
    number,
    pickled,
    row,
    storage,
    table,
    tensor,
    text,
    write,
    write_legacy,
    write_zip,
)

from tl_jax.errors import UserError
from tl_jax.pretrained import read, torch_pickle

FILES = Path(__file__).parent / 'files'
CONTAINERS = ('zip', 'legacy')
copyreg.add_extension('posix', 'mkdir', 0xF0)  # For EXT1.
copyreg.add_extension('os', 'mkdir', 0x1F0)  # For EXT2.
copyreg.add_extension('os', 'makedirs', 0x100F0)  # For EXT4.


class Calls:
    """Pickles as a call of any function, as exploits do."""

    def __init__(self, what, *args):
        self.call = what, args

    def __reduce__(self):
        return self.call


def exploits(canary: Path) -> dict[str, tuple[str, bytes]]:
    """Pickles that create the canary when Python's own pickle loads them, and what their errors must name."""
    shell, code = f'touch {canary}', f"open({str(canary)!r}, 'w').close()"
    imported = call(function('builtins', '__import__'), text('os'))
    looked_up = call(function('builtins', 'getattr'), imported, text('system'))
    system, argument = function('os', 'system'), text(shell)
    mapped = function('builtins', 'map') + row(system, b'](' + argument + b'e') + b'\x81'
    by_memo = text('os') + b'q\x00' + text('system') + b'q\x01' + b'h\x00h\x01\x93'
    setter = function('types', 'SimpleNamespace') + b')\x81' + table(__setstate__=system) + b'b'
    return {
        'os.system': ('posix.system', pickle.dumps({'w': Calls(os.system, shell)}, 2)),
        'os.system as a key': ('posix.system', pickle.dumps({Calls(os.system, shell): 1}, 2)),
        'os.system, protocol 0': ('posix.system', pickle.dumps(Calls(os.system, shell), 0)),
        'STACK_GLOBAL': ('posix.system', pickle.dumps({'w': Calls(os.system, shell)}, 4)),
        'STACK_GLOBAL, protocol 5': ('builtins.exec', pickle.dumps([Calls(exec, code)], 5)),
        'subprocess': ('subprocess.check_call', pickle.dumps(Calls(subprocess.check_call, ['touch', str(canary)]), 4)),
        'eval': ('builtin__.eval', pickle.dumps(Calls(eval, code), 2)),
        'exec': ('builtin__.exec', pickle.dumps(Calls(exec, code), 2)),
        '__import__ and getattr': ('builtins.getattr', pickled(looked_up + row(text(shell)) + b'R')),
        'INST': ('os.system', b'(' + text(shell) + b'ios\nsystem\n.'),
        'OBJ': ('os.system', b'(cos\nsystem\n' + text(shell) + b'o.'),
        'NEWOBJ': ('builtins.bytes', pickled(function('builtins', 'bytes') + row(mapped) + b'\x81')),
        'NEWOBJ_EX': ('builtins.bytes', pickled(function('builtins', 'bytes') + row(mapped) + b'}\x92')),
        'BUILD of a state setter': ('types.SimpleNamespace', pickled(setter + argument + b'b')),
        'names from the memo': ('os.system', pickled(by_memo + row(argument) + b'R')),
        'a function from the memo': ('os.system', pickled(system + b'q\x000' + b'h\x00' + row(argument) + b'R')),
        'a doubled function': ('os.system', pickled(system + b'20' + row(argument) + b'R')),
        'a memo of protocol 0': ('os.system', b'cos\nsystem\np0\n0g0\n(S' + repr(shell).encode() + b'\ntR.'),
        'functools.partial': (
            'functools.partial',
            pickled(call(function('functools', 'partial'), system, argument) + b')R'),
        ),
        'operator.methodcaller': (
            'operator.methodcaller',
            pickled(call(function('operator', 'methodcaller'), text('system'), argument) + row(imported) + b'R'),
        ),
        'runpy': ('runpy._run_code', pickle.dumps(Calls(runpy._run_code, code, {}), 2)),
        'a nested pickle': ('_pickle.loads', pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(exec, code))), 4)),
        'an argument of OrderedDict': (
            'os.system',
            pickled(call(function('collections', 'OrderedDict'), b'](' + call(system, argument) + b'e')),
        ),
        'a persistent id': ('os.system', pickled(row(text('storage'), call(system, argument)) + b'Q')),
        'modules through an allowed one': (
            'collections._sys.modules.get',
            b'\x80\x04'
            + text('collections')
            + text('_sys.modules.get')
            + b'\x93'
            + row(text('os'))
            + b'Rq\x00'
            + call(function('operator', 'methodcaller'), text('system'), argument)
            + row(b'h\x00')
            + b'R.',
        ),
        'EXT2': ('EXT2', b'\x80\x02\x83\xf0\x01' + row(text(str(canary))) + b'R.'),
        'EXT4': ('EXT4', b'\x80\x02\x84\xf0\x00\x01\x00' + row(text(str(canary))) + b'R.'),
        'EXT1': ('EXT1', b'\x80\x02\x82\xf0' + row(text(str(canary))) + b'R.'),
        'after the tensors': (
            'posix.system',
            pickled(table(w=tensor(), x=call(function('posix', 'system'), text(shell)))),
        ),
        'thrown away': ('posix.system', pickled(call(function('posix', 'system'), text(shell)) + b'0' + table())),
        'a state for BUILD': (
            'builtins.eval',
            pickled(table() + call(function('builtins', 'eval'), text(code)) + b'b'),
        ),
    }


NAMES = tuple(exploits(Path('/nowhere')))


def refused(path: Path) -> str:
    """Reads a file as a user would, arrays included, and returns the one line that refuses it."""
    with pytest.raises(UserError) as caught:
        for each in read(path).tensors.values():
            each.array()
    message = str(caught.value)
    assert path.name in message and message.isprintable()
    return message


@pytest.mark.parametrize('name', NAMES)
def test_exploits_work_in_pickle(name, tmp_path):
    """The control: what is refused below is real."""
    canary = tmp_path / 'canary'
    with contextlib.suppress(Exception):  # Some go on to fail, after they ran.
        Lenient(io.BytesIO(exploits(canary)[name][1])).load()
    assert canary.exists()


class Lenient(pickle.Unpickler):
    """Python's own, except that the names of torch, which is not here, are stand-ins."""

    def find_class(self, module, name):
        return (lambda *args: None) if module.startswith('torch') else super().find_class(module, name)

    def persistent_load(self, identity):
        return None


@pytest.mark.parametrize('container', CONTAINERS)
@pytest.mark.parametrize('name', NAMES)
def test_exploits_do_not_run(name, container, tmp_path):
    canary = tmp_path / 'canary'
    named, payload = exploits(canary)[name]
    message = refused(write(tmp_path / 'model.pth', payload, container))
    assert not canary.exists()
    assert named in message


@pytest.mark.parametrize('name', NAMES)
def test_exploits_in_any_pickle_of_a_legacy_file(name, tmp_path):
    canary = tmp_path / 'canary'
    payload = exploits(canary)[name][1]
    refused(write_legacy(tmp_path / 'system.pth', pickled(table(w=tensor())), {'0': (4, bytes(16))}, system=payload))
    path = tmp_path / 'first.pth'
    path.write_bytes(payload)
    refused(path)
    assert not canary.exists()


CALLABLES = """
os.system posix.system nt.system os.popen os.execv subprocess.Popen subprocess.call subprocess.getoutput pty.spawn
builtins.eval builtins.exec builtins.compile builtins.open builtins.getattr builtins.__import__ builtins.breakpoint
__builtin__.eval __builtin__.apply io.open _io.FileIO runpy.run_module runpy.run_path importlib.import_module
importlib.machinery.SourceFileLoader pkgutil.resolve_name code.InteractiveInterpreter.runcode timeit.timeit cProfile.run
profile.run pdb.run bdb.Bdb.run trace.Trace.run doctest.debug_script idlelib.run.Executive.runcode pydoc.pipepager
ensurepip._run_pip pip.main pip._internal.main venv.create uuid._get_command_stdout distutils.file_util.write_file
lib2to3.pgen2.pgen.ParserGenerator.make_label asyncio.unix_events._UnixSubprocessTransport._start
asyncio.create_subprocess_shell ctypes.CDLL webbrowser.open socket.create_connection urllib.request.urlretrieve
http.client.HTTPSConnection ssl.get_server_certificate smtplib.SMTP requests.api.get operator.attrgetter
operator.methodcaller functools.partial functools.reduce types.FunctionType types.CodeType marshal.loads pickle.loads
_pickle.loads pickle.Unpickler cloudpickle.loads dill.loads joblib.load shelve.open shutil.rmtree tempfile.mktemp
logging.config.dictConfig multiprocessing.util.spawnv_passfds signal.signal sys.settrace site.addsitedir copyreg._reconstructor
copyreg.__newobj__ codecs.encode numpy.load numpy.fromfile numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar
numpy.testing._private.utils.runstring numpy.f2py.crackfortran.getlincoef numpy.dtype torch.load torch.hub.load
torch.serialization.load torch.storage._load_from_bytes torch.jit.load torch.jit.unsupported_tensor_ops.execWrapper
torch.utils._config_module.load_config torch.utils.collect_env.run torch.utils.bottleneck.__main__.run_cprofile
torch.utils.data.datapipes.utils.decoder.basichandlers torch._dynamo.guards.GuardBuilder.get torch.package.PackageImporter
torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression torch._utils._rebuild_wrapper_subclass
torch._tensor._rebuild_from_type_v2 torch.nn.modules.linear.Linear torch.FloatTensor torch.Tensor torch.os.system
jax.lib.xla_client.register_custom_call_target keras.layers.Lambda argparse.Namespace __main__.Net collections.namedtuple
collections._sys.modules collections.OrderedDict.fromkeys collections.OrderedDict.__init__ Torch.Size torch..Size
torch.Size.__new__ .torch.Size torch.Size. torch._utils .torch
""".split()  # noqa: SIM905


@pytest.mark.parametrize('container', CONTAINERS)
@pytest.mark.parametrize('name', CALLABLES)
def test_refuses_every_other_callable_by_name(name, container, tmp_path):
    """What exploits have used (fickling, picklescan, modelscan list them), and near misses of what is allowed."""
    module, _, attribute = name.rpartition('.')
    by_stack = text(module) + text(attribute) + b'\x93'
    ways = [
        function(module, attribute) + b')R',
        by_stack + b')\x81',
        b'(i' + f'{module}\n{attribute}\n'.encode(),
        table(w=tensor(), z=by_stack),
    ]
    for way in ways:
        message = refused(write(tmp_path / 'model.pth', pickled(way), container))
        assert f'the pickle asks for {name!r}, which is not part of a tensor; nothing of it was run' in message


HUGE = 2**62
REFUSED = {
    'a huge shape': table(w=tensor(shape=(HUGE,))),
    'a shape whose product overflows': table(w=tensor(shape=(2**33, 2**33), strides=(1, 1))),
    'a shape beyond 64 bits': table(w=tensor(shape=(2**70,))),
    'a huge shape of nothing': table(w=tensor(shape=(0, HUGE), strides=(1, 1))),
    'a negative shape': table(w=tensor(shape=(-4,))),
    'a negative stride': table(w=tensor(shape=(2,), strides=(-1,))),
    'a negative offset': table(w=tensor(offset=-1, shape=(1,))),
    'an offset past the end': table(w=tensor(offset=1)),
    'a stride past the end': table(w=tensor(shape=(2, 2), strides=(3, 1))),
    'a stride past 64 bits': table(w=tensor(shape=(2,), strides=(2**64,))),
    'a scalar past the end': table(w=tensor(offset=4, shape=(), strides=())),
    'an expanded tensor': table(w=tensor(shape=(2**40,), strides=(0,))),
    'fewer strides than sizes': table(w=tensor(shape=(2, 2), strides=(1,))),
    'a hundred dimensions': table(w=tensor(shape=(1,) * 100, strides=(1,) * 100)),
    'a storage larger than the file': table(w=tensor(storage(size=HUGE), shape=(HUGE,))),
    'a storage of negative size': table(w=tensor(storage(size=-4))),
    'a storage of another name': table(w=tensor(storage(key='../../etc/passwd'))),
    'two sizes of one storage': table(v=tensor(storage(size=2), shape=(1,)), w=tensor()),
    'two types of one storage': table(v=tensor(storage('IntStorage')), w=tensor()),
    'a window past its storage': table(w=tensor(storage(window=row(text('1'), number(2), number(3))), shape=(1,))),
    'a storage that is no storage': table(w=tensor(row(text('storage'), text('torch.FloatStorage')) + b'Q')),
    'a storage of no storage type': table(w=tensor(storage('Size'))),
    'a module as persistent id': table(w=row(text('module'), text('os'), text(''), text('')) + b'Q'),
    'a function as persistent id': table(w=function('torch', 'Size') + b'Q'),
    'a persistent id of protocol 0': b'Ptouch\n',
    'a tensor on no storage': table(w=tensor(text('0'))),
    'a tensor that is called': table(w=tensor() + b')R'),
    'a state for a tensor': table(w=tensor() + table(x=b'N') + b'b'),
    'a parameter of a number': table(w=call(function('torch._utils', '_rebuild_parameter'), number(1))),
    'attributes by a dotted name': b'\x8c\x05torch\x8c\x0b_utils.load\x93',
    'a nested pickle': table(w=call(function('torch.storage', '_load_from_bytes'), text('x'))),
    'numpy': table(w=call(function('numpy.core.multiarray', '_reconstruct'), text('x'))),
    'NEWOBJ': function('torch', 'Size') + b')\x81',
    'a list as a key': b'}' + b']N' + b's',
    'a key that could be made to collide': b'}' + number(2**61 - 1 << 64) + b'Ns',
    'items without a dict': b'(NN' + b'u',
    'a memo that is not there': b'h\x07',
    'an empty stack': b'R',
    'an unknown opcode': b'\xff',
    'too many opcodes': b'N0' * 2,
    'a text longer than the file': b'\x8d' + b'\xff' * 7 + b'\x00' + b'abc',
    'no tensors': table(epoch=number(3)),
    'no table': number(3),
    'two tables': table(a=table(w=tensor()), b=table(w=tensor())),
    'a number for a name': b'}' + number(0) + tensor() + b's',
    'escapes and a line break in a name': function('os\x1b[2J', 'sys\ttem'),
}


@pytest.mark.parametrize('container', CONTAINERS)
@pytest.mark.parametrize('name', REFUSED)
def test_refuses(name, container, tmp_path):
    path = write(tmp_path / 'model.pth', pickled(REFUSED[name]), container)
    tracemalloc.start()
    refused(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize('container', CONTAINERS)
def test_reads_what_the_assembler_writes(container, tmp_path):
    """The control: the containers and the tensor above are sound where nothing is wrong with them."""
    contents = read(write(tmp_path / 'model.pth', pickled(table(w=tensor())), container))
    assert contents.tensors['w'].array().tolist() == [0, 0, 0, 0]


def test_the_stride_of_one_element_may_be_anything(tmp_path):
    value = table(w=tensor(shape=(1, 4), strides=(HUGE, 1)))
    assert read(write(tmp_path / 'model.pth', pickled(value), 'zip')).tensors['w'].array().shape == (1, 4)


def test_nesting_and_sharing_cost_nothing(tmp_path):
    deep = b'N' + b'\x85' * 200_000
    shared = (b']q' + bytes([i]) + b'(' + (b'h' + bytes([i - 1])) * 9 + b'e' for i in range(1, 40))
    laughs = row(b']q\x00', *shared)
    loop = b']q\x00(h\x00e'
    for value in (deep, laughs, loop):
        path = write(tmp_path / 'model.pth', pickled(table(w=tensor(), x=value)), 'zip')
        assert list(read(path).tensors) == ['w']


def test_bounds_the_length_of_a_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, 'MAX_OPCODES', 1000)
    assert 'opcodes' in refused(write(tmp_path / 'model.pth', pickled(b'N' * 1001), 'zip'))
    monkeypatch.setattr(torch_pickle, 'MAX_BYTES', 100)
    assert 'pickle has' in refused(write(tmp_path / 'model.pth', pickled(b'N' * 101), 'zip'))
    refused(write(tmp_path / 'model.pth', pickled(b'N' * 101), 'legacy'))


def test_refuses_zip_bombs(tmp_path):
    value = pickled(table(w=tensor(storage(size=1 << 22), shape=(1 << 22,))))
    path = write_zip(tmp_path / 'model.pth', value, {'0': bytes(1 << 24)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 15
    tracemalloc.start()
    assert 'compressed' in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_refuses_entries_that_share_their_bytes(tmp_path):
    """A directory may list one entry many times under as many names; Fifield's bombs are made so."""
    names = [str(i) for i in range(50)]
    value = table(**{f'w{name}': tensor(storage(key=name, size=1 << 18), shape=(1 << 18,)) for name in names})
    path = tmp_path / 'model.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', pickled(value))
        archive.writestr('archive/data/0', bytes(1 << 20))
        for name in names[1:]:
            entry = copy.copy(archive.infolist()[1])
            entry.filename = f'archive/data/{name}'
            archive.filelist.append(entry)
    assert path.stat().st_size < 1.1 * (1 << 20)
    assert 'overlaps another one' in refused(path)


def archives(payload: bytes) -> dict[str, bytes]:
    """Files that hide a pickle in archives within archives, or that are two formats at once."""
    plain, zipped, tarred = io.BytesIO(), io.BytesIO(), io.BytesIO()
    write_zip(plain, payload, {'0': bytes(16)})
    with tarfile.open(fileobj=tarred, mode='w') as archive:
        for name in ('pickle', 'storages', 'sys_info', 'tensors'):  # As torch before 0.1.10.
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    write_zip(zipped, plain.getvalue(), {'0': bytes(16)})
    held = io.BytesIO()
    write_zip(held, tarred.getvalue(), {'0': bytes(16)})
    return {
        'a zip as the pickle of a zip': zipped.getvalue(),
        'a tar as the pickle of a zip': held.getvalue(),
        'a tar': tarred.getvalue(),
        'gzip': gzip.compress(plain.getvalue(), mtime=0),
        'a pickle before a zip': payload + plain.getvalue(),
        'a zip before a pickle': plain.getvalue() + payload,
        'a tar before a zip': tarred.getvalue() + plain.getvalue(),
    }


@pytest.mark.filterwarnings('ignore:invalid escape')  # By pickletools, on the bytes of a zip.
@pytest.mark.parametrize('container', archives(b''))
@pytest.mark.parametrize('name', ['os.system', 'STACK_GLOBAL', 'exec', 'INST', 'NEWOBJ'])
def test_exploits_in_nested_archives_do_not_run(name, container, tmp_path):
    canary, path = tmp_path / 'canary', tmp_path / 'model.pth'
    path.write_bytes(archives(exploits(canary)[name][1])[container])
    refused(path)
    assert not canary.exists()


def test_a_storage_that_is_a_pickle_stays_numbers(tmp_path):
    canary = tmp_path / 'canary'
    payload = exploits(canary)['exec'][1]
    payload += bytes(-len(payload) % 4)
    value = pickled(table(w=tensor(storage(size=len(payload) // 4), shape=(len(payload) // 4,))))
    array = read(write_zip(tmp_path / 'model.pth', value, {'0': payload})).tensors['w'].array()
    assert array.tobytes() == payload and not canary.exists()


@pytest.mark.parametrize(
    ('content', 'kind'),
    [
        (gzip.compress(b'x', mtime=0), 'gzip'),
        (archives(b'x')['a tar'], 'a tar archive'),
        (b'<!DOCTYPE html>', 'a web page'),
        (bytes([2]) + bytes(7) + b'{}', 'safetensors'),
        (pickle.dumps({}, 4), 'a pickle of another protocol'),
        (b'\x00' * 20, 'first bytes are 0000000000000000'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', "run 'git lfs pull'"),
    ],
)
def test_says_what_other_files_look_like(content, kind, tmp_path):
    (tmp_path / 'model.pth').write_bytes(content)
    assert kind in refused(tmp_path / 'model.pth')


@pytest.mark.parametrize('container', CONTAINERS)
def test_refuses_storages_of_another_size(container, tmp_path):
    path, value = tmp_path / 'model.pth', pickled(table(w=tensor()))
    if container == 'zip':
        refused(write_zip(path, value, {'0': bytes(12)}))
        refused(write_zip(path, value, {}))
    else:
        refused(write_legacy(path, value, {'0': (4, bytes(12))}))
        refused(write_legacy(path, value, {'0': (HUGE, bytes(16))}))
        refused(write_legacy(path, value, {}))


def test_refuses_other_zips_and_pickles(tmp_path):
    path = tmp_path / 'model.pth'
    for members in (['readme'], ['a/data.pkl', 'b/data.pkl']):
        with zipfile.ZipFile(path, 'w') as archive:
            for member in members:
                archive.writestr(member, b'x')
        assert 'data.pkl' in refused(path)
    for content in (b'', b'PK', b'\x80\x02', b'ustar', pickle.dumps({'w': 1}, 2)):
        path.write_bytes(content)
        refused(path)


@pytest.mark.parametrize('name', ['zip.pth', 'zip_protocol4.pt', 'legacy.th', 'v3.pth', 'legacy_window.th'])
def test_damage_never_surprises(name, tmp_path):
    """Truncated anywhere, or with bytes changed: a UserError, or tensors where the damage touched only values."""
    whole = (FILES / name).read_bytes()
    path, generator = tmp_path / name, random.Random(0)
    cuts = {*range(min(len(whole), 40)), *generator.sample(range(len(whole)), 40), len(whole) - 1}
    versions = [whole[:cut] for cut in cuts]
    for _ in range(100):
        changed = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4, 16])):
            changed[generator.randrange(len(whole))] = generator.randrange(256)
        versions.append(bytes(changed))
    tracemalloc.start()
    for number_, version in enumerate(versions):
        path.write_bytes(version)
        try:
            for each in read(path).tensors.values():
                each.array()
            assert number_ >= len(cuts), 'a truncated file was read'
        except UserError as error:
            assert str(error).isprintable()
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
