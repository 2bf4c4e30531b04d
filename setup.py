"""Package metadata comes from settings.ini; edit there, not here."""

import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
EXPERIMENTS = ROOT / "nbs" / "experiments"
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
SUFFIX = "_requirements"
FIRST, LAST = (int(cfg[key].removeprefix("3.")) for key in ("min_python", "max_python"))


def requirements(key: str) -> list[str]:
    """The requirements listed under `key`, separated by spaces."""
    return shlex.split(cfg[key])


extras = {key.removesuffix(SUFFIX): requirements(key) for key in cfg if key.endswith(SUFFIX)}
for used in ("avatars", "pascal", "fetch", "encoders", "docs"): extras["dev"] += extras[used]  # the tests use them


class BuildWithExperiments(build_py):
    """Puts the experiments and the Snakefile into what is built, for an installed `lagm`; a checkout uses its own."""

    def run(self) -> None:
        super().run()
        if self.editable_mode: return
        target = Path(self.build_lib) / cfg["lib_path"] / "_experiments"
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
        for source in experiment_files():
            place = target / source.name if source.name == "Snakefile" else target / source.relative_to(EXPERIMENTS)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)


def experiment_files() -> list[Path]:
    """The notebooks and parameter files of the experiments, and the Snakefile; no copies that editors leave."""
    found = [path for pattern in ("*.ipynb", "*.yaml", "*/*.yaml") for path in EXPERIMENTS.glob(pattern)]
    shown = sorted(path for path in found if path.name[0] not in "._" and path.parent.name[0] != ".")
    return [ROOT / "nbs" / "Snakefile", *shown]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE*"],
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    classifiers=[
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(FIRST, LAST + 1)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">=3.{FIRST},<3.{LAST + 1}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["assets/**/*", "py.typed"]},
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split("\n"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithExperiments},
    zip_safe=False,
)
