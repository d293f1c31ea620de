from setuptools import setup  # metadata is in setup.cfg; old pip needs this file to install it
setup()
