// Parameters of a kernel as its cubin declares them. A cubin is an ELF file; the section `.nv.info.KERNEL` lists
// attributes, and one attribute for each parameter gives its number and size.
#include "standin.h"

#include <elf.h>
#include <string.h>

// An attribute: format, number, then either a 16-bit value or the length of what follows.
enum { FORMAT_SIZED = 4 };
enum { PARAMETER = 0x17, PARAMETER_V2 = 0x45 };

typedef struct {
  unsigned char format, number;
  unsigned short size;
} Attribute;

static void read_attributes(const char *at, size_t length, Function *function) {
  const char *end = at + length;
  function->params = 0;
  while (at + sizeof(Attribute) <= end) {
    const Attribute *attribute = (const Attribute *)at;
    const char *payload = at + sizeof *attribute;
    if (attribute->format == FORMAT_SIZED) {
      if (attribute->number == PARAMETER && attribute->size >= 12) {
        unsigned short ordinal;
        unsigned bits;
        memcpy(&ordinal, payload + 4, sizeof ordinal);
        memcpy(&bits, payload + 8, sizeof bits);
        if (ordinal < MAX_PARAMS) {
          // The upper 14 bits are the size in bytes.
          function->sizes[ordinal] = bits >> 18;
          if (ordinal >= function->params) function->params = ordinal + 1;
        }
      }
      payload += attribute->size;
    }
    at = payload;
  }
}

void read_parameters(const void *image, Function *function) {
  const char *base = image;
  const Elf64_Ehdr *header = image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(base + header->e_shoff);
  const char *names = base + sections[header->e_shstrndx].sh_offset;
  const char prefix[] = ".nv.info.";
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + sections[i].sh_name;
    if (!strncmp(name, prefix, strlen(prefix)) && !strcmp(name + strlen(prefix), function->name))
      read_attributes(base + sections[i].sh_offset, sections[i].sh_size, function);
  }
}
