"Package metadata from settings.ini; the library lives in lib/ so that the same folder is the Kaggle dataset's root."
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {name: cfg[f'{name}_requirements'].split() for name in ('dev', 'demo', 'kaggle', 'sweep', 'gpu')}


class BuildWithKernels(build_py):
    "A wheel carries the kernels, so that `underdog run train` needs no checkout."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return   # there they lie in nbs/
        target = Path(self.build_lib)/'underdog'/'notebooks'
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted((here/'nbs'/'kernels').glob('*.ipynb')): shutil.copyfile(file, target/file.name)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'], author=cfg['author'],
    author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages('lib'), package_dir={'': 'lib'}, python_requires='>=' + cfg['min_python'],
    package_data={'underdog.kaggle': ['*.txt'], 'underdog.search': ['*.csv']}, cmdclass={'build_py': BuildWithKernels},
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
