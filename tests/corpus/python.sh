# Makes a Python environment of copies, installs a source package with sixteen extension
# modules into it, imports them all.
# Attack: critical exec.new /opt/venv/bin/report

export HOME=/root

prepare() {
    mkdir -p /root/package/fast
    cd /root/package
    : >fast/__init__.py
    printf 'import fast._m1\n\ndef main():\n    print(fast._m1.answer())\n' >fast/tool.py
    for number in $(seq 16); do
        cat >fast/_m$number.c <<END
#include <Python.h>

static PyObject *answer(PyObject *self, PyObject *none)
{
    return PyLong_FromLong(40 + $number);
}

static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_m$number", "", -1, methods};

PyMODINIT_FUNC PyInit__m$number(void) { return PyModule_Create(&module); }
END
    done
    cat >setup.py <<'END'
from setuptools import Extension, setup

setup(
    name="fast",
    version="1.0",
    packages=["fast"],
    ext_modules=[Extension(f"fast._m{n}", [f"fast/_m{n}.c"]) for n in range(1, 17)],
    entry_points={"console_scripts": ["fast = fast.tool:main"]},
)
END
}

round() {
    rm -rf /opt/venv /tmp/sdist
    cd /root/package
    python3 setup.py sdist --dist-dir /tmp/sdist
    python3 -m venv --copies --system-site-packages /opt/venv
    /opt/venv/bin/pip install --no-index --no-build-isolation --no-deps /tmp/sdist/fast-1.0.tar.gz
    cd /
    for number in $(seq 3); do
        /opt/venv/bin/python -c 'import importlib
print(sum(importlib.import_module(f"fast._m{n}").answer() for n in range(1, 17)))'
        /opt/venv/bin/fast
    done
}

attack() {
    cp /.control/payload /opt/venv/bin/report
    /opt/venv/bin/report
}
