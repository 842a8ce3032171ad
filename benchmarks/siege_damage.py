"""Hypothesis strategies for what is damaged: test files, samples, run folders, settings."""
import csv
import io
import json

from hypothesis import strategies as st

TEXTS = ('prompt', 'response_a', 'response_b')
CELLS = st.sampled_from(['', '[]', '[1]', 'null', 'plain text', '{"a": 1}', '[["x"]]', '["x', '[null]', '["x", "y"]',
                         '[1e999]', '['*2000, '"x"', '\\ud800', '["\\ud800"]']) | st.text(max_size=8)
IDS = st.sampled_from(['', 'nan', '1.0', '007', ' 7 ', '1e3', '-1', 'x', '7', '99999999999999999999'])
SPOILS = ('', 'é'.encode('latin-1'), b'"', b'\0', b'\xff\xfe', b'\r', b'\n,,\n')
# what a header may have become
HEADERS = (b'', b'id\n', b'\x89PNG\r\n', b'a,b\n1,2\n', b'id,prompt\n1,x\n', b'\xff\xfei\0d\0\n\0', b'\0'*300)


# ---- tables
@st.composite
def damaged_rows(draw, content):
    "The bytes of a test file with faults below its header."
    header, *rows = csv.reader(io.StringIO(content))
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.integers(0, len(rows) - 1))
        kind = draw(st.sampled_from(['cell', 'id', 'short', 'long', 'twice', 'gone']))
        if kind == 'gone' and len(rows) > 1: rows.pop(row)
        elif kind == 'twice': rows.append(rows[row])
        elif kind == 'short': rows[row] = rows[row][:draw(st.integers(0, 3))]
        elif kind == 'long': rows[row] = rows[row] + ['more']
        elif kind == 'id' and rows[row]: rows[row] = [draw(IDS), *rows[row][1:]]
        elif len(rows[row]) == 4: rows[row] = [*rows[row][:-1], draw(CELLS)]
    out = io.StringIO()
    csv.writer(out).writerows([header, *rows])
    raw = out.getvalue().encode('utf-8', 'surrogatepass')
    # bytes that are no UTF-8, an open quote, a file cut off
    at = draw(st.integers(len(','.join(header)) + 2, len(raw)))
    spoil = draw(st.sampled_from([s.encode() if isinstance(s, str) else s for s in SPOILS]))
    return raw[:at] + spoil + (raw[at:] if draw(st.booleans()) else b'')


@st.composite
def spoiled(draw, raw):
    "The bytes `raw` cut, doubled, overwritten, in another encoding, or others in their place."
    how = draw(st.sampled_from(['cut', 'flip', 'insert', 'twice', 'utf16', 'empty', 'noise', 'json', 'zeros']))
    at = draw(st.integers(0, max(0, len(raw) - 1)))
    if how == 'cut': return raw[:at]
    if how == 'flip': return raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1:] if raw else b'\0'
    if how == 'insert': return raw[:at] + draw(st.binary(min_size=1, max_size=9)) + raw[at:]
    if how == 'twice': return raw + raw[at:]
    if how == 'utf16': return raw.decode('latin-1').encode('utf-16')
    if how == 'json': return json.dumps(draw(JUNK)).encode('utf-8', 'surrogatepass')
    return dict(empty=b'', noise=draw(st.binary(max_size=200)), zeros=b'\0'*len(raw))[how]


# ---- values of any type
NUMBERS = st.sampled_from([0, -1, 1, 2**63, -2**70, 10**400, 1e308, -0.0, 1e-320, float('inf'), float('nan')])
WORDS = st.sampled_from(['', 'nan', 'inf', '-1', '1e999', 'None', 'true', 'x'*5000, '../..', '/dev/null', '\0', '${x}',
                         '{0}', '[/x]', '\u202e', '\ud800', 'é'])
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
                    max_leaves=6)


@st.composite
def changed_record(draw, record):
    "A JSON object with one of its values, at any depth, replaced, renamed or gone."
    record = json.loads(json.dumps(record))
    place = record
    while True:
        name = draw(st.sampled_from(sorted(place)))
        if not (isinstance(place[name], dict) and place[name] and draw(st.booleans())): break
        place = place[name]
    how = draw(st.sampled_from(['value', 'value', 'gone', 'renamed']))
    old = place.pop(name)
    if how == 'value': place[name] = draw(JUNK)
    if how == 'renamed': place[f'{name}s'] = old
    return record


# ---- run folders
@st.composite
def damaged_file(draw, folder):
    "(name, bytes; None: it is gone) of a file below `folder`, a run or a base model."
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file() and f.name != '.lock')
    name = draw(st.sampled_from(names))
    raw = (folder/name).read_bytes()
    if draw(st.integers(0, 4)) == 0: return name, None
    if name.endswith('.json') and draw(st.booleans()):
        record = json.loads(raw)
        if isinstance(record, dict) and record:
            return name, json.dumps(draw(changed_record(record))).encode('utf-8', 'surrogatepass')
    return name, draw(spoiled(raw))


def write_damage(folder, damage):
    "Damage files below `folder` as a list of (name, bytes) says."
    for name, raw in damage:
        if raw is None: (folder/name).unlink(missing_ok=True)
        else: (folder/name).write_bytes(raw)
