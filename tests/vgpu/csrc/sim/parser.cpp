// PTX text -> AST (functions with scoped registers, module symbols).
#include <cstdarg>

#include "core.h"
namespace vsim {
static std::string vstrf(const char* fmt, va_list ap) {
  char b[4096];
  vsnprintf(b, sizeof b, fmt, ap);
  return b;
}
std::string strf(const char* fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  std::string s = vstrf(fmt, ap);
  va_end(ap);
  return s;
}
void fail(Fault kind, const char* fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  SimError e{kind, vstrf(fmt, ap)};
  va_end(ap);
  throw e;
}
void fail_lane(Fault kind, int lane, const char* fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  SimError e{kind, vstrf(fmt, ap), lane};
  va_end(ap);
  throw e;
}
void fail_at(Fault kind, int lane, u64 address, const char* fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  SimError e{kind, vstrf(fmt, ap), lane, true, address};
  va_end(ap);
  throw e;
}

static const struct {
  const char* n;
  Ty t;
  int size;
} TYS[] = {{"b8", B8, 1},         {"b16", B16, 2},     {"b32", B32, 4},     {"b64", B64, 8},
           {"b128", B128, 16},    {"u8", U8, 1},       {"u16", U16, 2},     {"u32", U32, 4},
           {"u64", U64, 8},       {"s8", S8, 1},       {"s16", S16, 2},     {"s32", S32, 4},
           {"s64", S64, 8},       {"f16", F16, 2},     {"f16x2", F16X2, 4}, {"bf16", BF16, 2},
           {"bf16x2", BF16X2, 4}, {"f32", F32, 4},     {"f64", F64, 8},     {"tf32", TF32, 4},
           {"pred", PRED, 4},     {"e4m3", E4M3, 1},   {"e5m2", E5M2, 1},   {"e4m3x2", E4M3X2, 2},
           {"e5m2x2", E5M2X2, 2}, {"u16x2", U16X2, 4}, {"s16x2", S16X2, 4}, {"f32x2", F32X2, 8},
           {"s4", S4, 1},         {"u4", U4, 1},       {"b1", B1, 1}};
Ty parse_type(const std::string& s) {
  for (auto& t : TYS)
    if (s == t.n) return t.t;
  return T_NONE;
}
const char* type_name(Ty t) {
  for (auto& x : TYS)
    if (x.t == t) return x.n;
  return "none";
}
int ty_size(Ty t) {
  for (auto& x : TYS)
    if (x.t == t) return x.size;
  return 0;
}

std::string line_text(const Module& M, u32 line) {
  if (line == 0 || line > M.lines.size()) return "";
  std::string s = M.lines[line - 1];
  size_t b = s.find_first_not_of(" \t");
  if (b == std::string::npos) return "";
  size_t c = s.find("//");
  if (c != std::string::npos && c > b) s = s.substr(0, c);
  while (!s.empty() && isspace((unsigned char)s.back())) s.pop_back();
  return s.size() > b ? s.substr(b) : "";
}

struct Parser {
  Module& M;
  const std::string& s;
  size_t p = 0;
  u32 line = 1;
  Function* F = nullptr;
  struct Scope {
    std::unordered_map<std::string, int> regs;
    std::unordered_map<std::string, int> vars;
    std::map<std::string, u32> labels;
    int id;
  };
  std::vector<Scope> scopes;
  int scope_id = 0;
  struct Fix {
    size_t inst;
    size_t opi;
    int eli;
    size_t depth;
  };
  std::vector<Fix> fixes;  // unresolved label operands
  Parser(Module& m) : M(m), s(m.text) {}

  [[noreturn]] void err(const std::string& m) {
    fail(Fault::Unsupported, "PTX parse error at line %u: %s\n    %s", line, m.c_str(),
         line_text(M, line).c_str());
  }
  void ws() {
    for (;;) {
      while (p < s.size() && isspace((unsigned char)s[p])) {
        if (s[p] == '\n') line++;
        p++;
      }
      if (p + 1 < s.size() && s[p] == '/' && s[p + 1] == '/') {
        while (p < s.size() && s[p] != '\n') p++;
        continue;
      }
      if (p + 1 < s.size() && s[p] == '/' && s[p + 1] == '*') {
        p += 2;
        while (p + 1 < s.size() && !(s[p] == '*' && s[p + 1] == '/')) {
          if (s[p] == '\n') line++;
          p++;
        }
        p += 2;
        continue;
      }
      return;
    }
  }
  void eol() {
    while (p < s.size() && s[p] != '\n') p++;
  }
  bool eof() {
    ws();
    return p >= s.size();
  }
  char peek() {
    ws();
    return p < s.size() ? s[p] : 0;
  }
  bool accept(char c) {
    if (peek() == c) {
      p++;
      return true;
    }
    return false;
  }
  void expect(char c) {
    if (!accept(c)) err(strf("expected '%c' before '%.20s'", c, s.c_str() + std::min(p, s.size())));
  }
  static bool idc(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%'; }
  std::string ident() {
    ws();
    size_t b = p;
    while (p < s.size() && idc(s[p])) p++;
    return s.substr(b, p - b);
  }
  std::string dotword() {
    ws();
    size_t b = p;
    if (s[p] == '.') p++;
    while (p < s.size() && (idc(s[p]) || (s[p] == ':' && p + 1 < s.size() && s[p + 1] == ':') ||
                            (s[p] == ':' && s[p - 1] == ':')))
      p++;
    return s.substr(b, p - b);
  }
  std::string mnemonic() {
    ws();
    size_t b = p;
    while (p < s.size() &&
           (idc(s[p]) || s[p] == '.' || (s[p] == ':' && p + 1 < s.size() && s[p + 1] == ':') ||
            (s[p] == ':' && s[p - 1] == ':')))
      p++;
    return s.substr(b, p - b);
  }
  bool looking(const char* w) {
    ws();
    size_t n = strlen(w);
    return s.compare(p, n, w) == 0 && (p + n >= s.size() || !(idc(s[p + n]) || s[p + n] == ':'));
  }
  bool acceptw(const char* w) {
    if (looking(w)) {
      p += strlen(w);
      return true;
    }
    return false;
  }
  i64 integer() {
    bool neg = false;
    ws();
    while (s[p] == '-' || s[p] == '+') {
      if (s[p] == '-') neg = !neg;
      p++;
      ws();
    }
    if (!isdigit((unsigned char)s[p])) err("integer expected");
    char* e;
    u64 v;
    if (s[p] == '0' && (s[p + 1] == 'b' || s[p + 1] == 'B')) {
      v = strtoull(s.c_str() + p + 2, &e, 2);
    } else
      v = strtoull(s.c_str() + p, &e, 0);
    p = e - s.c_str();
    if (s[p] == 'U') p++;
    return neg ? -(i64)v : (i64)v;
  }
  void skip_braces() {
    expect('{');
    int d = 1;
    while (d && p < s.size()) {
      char c = s[p++];
      if (c == '\n') line++;
      if (c == '{') d++;
      if (c == '}') d--;
    }
  }

  // ---- symbols
  int add_sym(Symbol y, bool local_scope) {
    if (!local_scope) {
      auto it = M.symidx.find(y.name);
      if (it != M.symidx.end()) {
        Symbol& o = M.syms[it->second];
        if (y.size && (!o.size || o.is_extern)) {
          y.func = o.func;
          o = y;
        }
        return it->second;
      }
    }
    int id = M.syms.size();
    M.syms.push_back(y);
    if (local_scope)
      scopes.back().vars[y.name] = id;
    else
      M.symidx[y.name] = id;
    return id;
  }
  void parse_init(Symbol& y, int esz) {
    // flat list (nested braces allowed)
    size_t off = 0;
    if (y.init.size() < y.size) y.init.resize(y.size, 0);
    auto put = [&](u64 v) {
      if (off + esz > y.init.size()) y.init.resize(off + esz, 0);
      memcpy(&y.init[off], &v, esz);
      off += esz;
    };
    std::vector<int> dummy;
    int depth = 0;
    bool braces = peek() == '{';
    for (;;) {
      char c = peek();
      if (c == '{') {
        p++;
        depth++;
        continue;
      }
      if (c == '}') {
        p++;
        depth--;
        if (depth == 0) break;
        accept(',');
        continue;
      }
      if (c == ',') {
        p++;
        continue;
      }
      if (c == '0' && (s[p + 1] == 'f' || s[p + 1] == 'F')) {
        u64 v = strtoull(s.substr(p + 2, 8).c_str(), 0, 16);
        p += 10;
        put(v);
      } else if (c == '0' && (s[p + 1] == 'd' || s[p + 1] == 'D')) {
        u64 v = strtoull(s.substr(p + 2, 16).c_str(), 0, 16);
        p += 18;
        put(v);
      } else if (isdigit((unsigned char)c) || c == '-' || c == '+') {
        size_t q = p;
        char* e;
        double dv = strtod(s.c_str() + p, &e);
        size_t fe = e - s.c_str();
        i64 iv = integer();
        if (fe > p && (y.ty == F32 || y.ty == F64) && s.substr(q, 2) != "0x") {
          p = fe;
          if (y.ty == F32) {
            float f = dv;
            u32 b;
            memcpy(&b, &f, 4);
            put(b);
          } else {
            u64 b;
            memcpy(&b, &dv, 8);
            put(b);
          }
        } else {
          if (peek() == '(') err("masked symbol initialiser not supported");
          put(iv);
        }
      } else {
        bool gen = false;
        if (acceptw("generic")) {
          expect('(');
          gen = true;
        }
        std::string n = ident();
        if (n.empty()) err("initialiser");
        i64 add = 0;
        if (peek() == '+' || peek() == '-') add = integer();
        if (gen) expect(')');
        if (peek() == '+' || peek() == '-') add += integer();
        if (esz != 8) err("symbol initialiser of size != 8");
        y.pending.push_back({(u32)off, {n, add}});
        put(0);
      }
      if (!braces) break;
    }
  }
  // after the space keyword
  void var_decl(Space sp, bool is_extern, bool local_scope) {
    Ty ty = T_NONE;
    u32 align = 0;
    int vec = 1;
    for (;;) {
      ws();
      if (s[p] != '.') break;
      std::string w = dotword().substr(1);
      if (w == "align") {
        align = integer();
        continue;
      }
      if (w == "attribute") {
        expect('(');
        while (s[p] != ')') p++;
        p++;
        continue;
      }
      if (w == "v2") {
        vec = 2;
        continue;
      }
      if (w == "v4") {
        vec = 4;
        continue;
      }
      if (w == "ptr" || w == "global" || w == "shared" || w == "const" || w == "local") continue;
      if (w == "texref" || w == "samplerref" || w == "surfref")
        err("texture/surface references are not supported");
      Ty t = parse_type(w);
      if (t == T_NONE) err("unknown type ." + w);
      ty = t;
    }
    if (ty == T_NONE) err("variable without type");
    do {
      Symbol y;
      y.sp = sp;
      y.ty = ty;
      y.is_extern = is_extern;
      y.name = ident();
      if (y.name.empty()) err("variable name expected");
      u64 n = vec;
      bool arr = false, open = false;
      while (accept('[')) {
        arr = true;
        if (peek() == ']') {
          open = true;
        } else
          n *= (u64)integer();
        expect(']');
      }
      int esz = ty_size(ty);
      y.align = std::max<u32>(align, vec * esz);
      y.size = open ? 0 : n * esz;
      (void)arr;
      if (accept('=')) {
        parse_init(y, esz);
        if (y.size < y.init.size()) y.size = y.init.size();
      }
      y.owner = F ? F->id : -1;
      if (sp == SP_LOCAL || (sp == SP_PARAM && F)) {
        u32 o = (M.local_bytes + y.align - 1) / y.align * y.align;
        if (y.align < 4) o = (o + 3) & ~3u;
        y.addr = o;
        M.local_bytes = o + (u32)y.size;
        y.thread_param = sp == SP_PARAM;
      }
      add_sym(y, local_scope);
    } while (accept(','));
    expect(';');
  }
  void reg_decl() {
    ws();
    std::string w = dotword().substr(1);
    int vec = 1;
    if (w == "v2") {
      vec = 2;
      w = dotword().substr(1);
    }
    if (w == "v4") {
      vec = 4;
      w = dotword().substr(1);
    }
    if (vec > 1) err("vector .reg declarations are not supported");
    Ty t = parse_type(w);
    if (t == T_NONE) err("unknown register type ." + w);
    do {
      std::string n = ident();
      i64 cnt = -1;
      if (accept('<')) {
        cnt = integer();
        expect('>');
      }
      int sz = ty_size(t);
      u32 bytes = t == PRED ? 4 : std::max(sz, 1) * 32;
      auto add = [&](const std::string& nm) {
        u32 al = t == PRED ? 4 : 64;
        F->frame = (F->frame + al - 1) / al * al;
        F->regs.push_back({nm, t, F->frame});
        F->frame += bytes;
        scopes.back().regs[nm] = F->regs.size() - 1;
      };
      if (cnt < 0)
        add(n);
      else
        for (i64 k = 0; k < cnt; k++) add(n + std::to_string(k));
    } while (accept(','));
    expect(';');
  }
  int find_reg(const std::string& n) {
    for (size_t k = scopes.size(); k-- > 0;) {
      auto it = scopes[k].regs.find(n);
      if (it != scopes[k].regs.end()) return it->second;
    }
    return -1;
  }
  int find_var(const std::string& n) {
    for (size_t k = scopes.size(); k-- > 0;) {
      auto it = scopes[k].vars.find(n);
      if (it != scopes[k].vars.end()) return it->second;
    }
    return M.sym(n);
  }

  Operand operand() {
    Operand o;
    char c = peek();
    if (c == '{') {
      p++;
      o.kind = Operand::Vec;
      if (peek() != '}') do
          o.el.push_back(operand());
        while (accept(','));
      expect('}');
      return o;
    }
    if (c == '[') {
      p++;
      o.kind = Operand::Mem;
      do o.el.push_back(operand());
      while (accept(','));
      expect(']');
      return o;
    }
    if (c == '(') {
      p++;
      o.kind = Operand::Paren;
      if (peek() != ')') do
          o.el.push_back(operand());
        while (accept(','));
      expect(')');
      return o;
    }
    if (c == '!') {
      p++;
      o = operand();
      o.neg = !o.neg;
      return o;
    }
    if (c == '_' && !idc(s[p + 1])) {
      p++;
      o.kind = Operand::Sink;
      return o;
    }
    if (c == '-' && !isdigit((unsigned char)s[p + 1])) {
      p++;
      ws();
      o = operand();
      o.neg = !o.neg;
      return o;
    }
    if (isdigit((unsigned char)c) || ((c == '-' || c == '+') && isdigit((unsigned char)s[p + 1]))) {
      if (c == '0' && (s[p + 1] == 'f' || s[p + 1] == 'F')) {
        o.kind = Operand::FImm;
        o.fsize = 4;
        o.fbits = strtoull(s.substr(p + 2, 8).c_str(), 0, 16);
        p += 10;
        return o;
      }
      if (c == '0' && (s[p + 1] == 'd' || s[p + 1] == 'D')) {
        o.kind = Operand::FImm;
        o.fsize = 8;
        o.fbits = strtoull(s.substr(p + 2, 16).c_str(), 0, 16);
        p += 18;
        return o;
      }
      // decimal float?
      size_t q = p;
      if (s[q] == '-' || s[q] == '+') q++;
      bool hex = s[q] == '0' && (s[q + 1] == 'x' || s[q + 1] == 'X');
      size_t e = q;
      while (isalnum((unsigned char)s[e])) e++;
      if (!hex && (s[e] == '.' && isdigit((unsigned char)s[e + 1]))) {
        char* ee;
        double v = strtod(s.c_str() + p, &ee);
        p = ee - s.c_str();
        o.kind = Operand::FImm;
        o.fsize = 0;
        memcpy(&o.fbits, &v, 8);
        return o;
      }
      o.kind = Operand::Imm;
      o.imm = integer();
      while (peek() == '+' || peek() == '-') o.imm += integer();
      return o;
    }
    std::string n = ident();
    if (n.empty()) err(strf("operand expected near '%.20s'", s.c_str() + p));
    int r = find_reg(n);
    if (r >= 0) {
      o.kind = Operand::Reg;
      o.reg = r;
      o.name = n;
      if (peek() == '+' && s[p + 1] != '+') {
        p++;
        o.imm = integer();
      } else if (peek() == '-') {
        o.imm = integer();
      }
      return o;
    }
    if (n[0] == '%' && (s[p] == '.')) {
      p++;
      n += "." + ident();
    }
    int v = find_var(n);
    if (v >= 0) {
      o.kind = Operand::Sym;
      o.sym = v;
      o.name = n;
      if (peek() == '+') {
        p++;
        o.imm = integer();
      } else if (peek() == '-')
        o.imm = integer();
      return o;
    }
    if (n == "WARP_SZ") {
      o.kind = Operand::Imm;
      o.imm = 32;
      return o;
    }
    o.kind = Operand::Label;
    o.name = n;
    if (n[0] != '%' && (peek() == '+')) {
      p++;
      o.imm = integer();
    }
    return o;
  }
  static void split(const std::string& m, std::vector<std::string>& out) {
    size_t b = 0;
    for (size_t k = 0; k <= m.size(); k++)
      if (k == m.size() || m[k] == '.') {
        out.push_back(m.substr(b, k - b));
        b = k + 1;
      }
  }
  void define_label(const std::string& n) {
    Scope& sc = scopes.back();
    if (sc.labels.count(n)) err("duplicate label " + n);
    sc.labels[n] = F->code.size();
  }
  std::string uniq(const Scope& sc, const std::string& n) {
    return sc.id == 0 ? n : n + "@" + std::to_string(sc.id);
  }
  void pop_scope() {
    Scope& sc = scopes.back();
    size_t depth = scopes.size();
    for (auto& l : sc.labels) F->labels[uniq(sc, l.first)] = l.second;
    // resolve branch operands recorded at this depth
    for (auto it = fixes.begin(); it != fixes.end();) {
      if (it->depth == depth) {
        Operand& o = F->code[it->inst].ops[it->opi];
        if (sc.labels.count(o.name)) {
          o.name = uniq(sc, o.name);
          it = fixes.erase(it);
          continue;
        }
        it->depth--;
      }
      ++it;
    }
    scopes.pop_back();
  }
  void instruction() {
    PInst I;
    ws();
    I.line = line;
    if (accept('@')) {
      if (accept('!')) I.guard_neg = true;
      std::string g = ident();
      I.guard = find_reg(g);
      if (I.guard < 0) err("unknown guard " + g);
      ws();
      I.line = line;
    }
    I.op = mnemonic();
    if (I.op.empty()) err(strf("instruction expected near '%.20s'", s.c_str() + p));
    split(I.op, I.mods);
    if (peek() != ';') {
      do {
        I.ops.push_back(operand());
        while (peek() == '|') {
          p++;
          I.pipe = I.ops.size() - 1;
          I.ops.push_back(operand());
        }
      } while (accept(','));
    }
    expect(';');
    F->code.push_back(I);
    for (size_t k = 0; k < I.ops.size(); k++)
      if (I.ops[k].kind == Operand::Label)
        fixes.push_back({F->code.size() - 1, k, -1, scopes.size()});
  }
  void param_list(std::vector<Param>& out, u32* total, bool entry) {
    expect('(');
    u32 off = 0;
    if (peek() != ')') do {
        Param q;
        q.ty = B8;
        u32 align = 0;
        bool isreg = false;
        for (;;) {
          ws();
          if (s[p] != '.') break;
          std::string w = dotword().substr(1);
          if (w == "param") continue;
          if (w == "reg") {
            isreg = true;
            continue;
          }
          if (w == "align") {
            u32 a = integer();
            if (!align)
              align = a;
            else
              (void)a;
            continue;
          }
          if (w == "ptr") {  // .ptr .space .align N : describes the pointee
            for (;;) {
              ws();
              if (s[p] != '.') break;
              size_t sv = p;
              std::string x = dotword().substr(1);
              if (x == "align") {
                integer();
                break;
              }
              if (x == "global" || x == "shared" || x == "const" || x == "local" || x == "generic")
                continue;
              p = sv;
              break;
            }
            continue;
          }
          Ty t = parse_type(w);
          if (t == T_NONE) err("unknown parameter type ." + w);
          q.ty = t;
        }
        if (isreg) err(".reg function parameters are not supported");
        q.name = ident();
        u64 n = 1;
        while (accept('[')) {
          if (peek() != ']') n *= integer();
          expect(']');
        }
        q.size = n * ty_size(q.ty);
        q.align = std::max<u32>(align, ty_size(q.ty));
        off = (off + q.align - 1) / q.align * q.align;
        q.off = off;
        off += q.size;
        Symbol y;
        y.name = q.name;
        y.sp = SP_PARAM;
        y.ty = q.ty;
        y.align = q.align;
        y.size = q.size;
        y.owner = F->id;
        if (entry) {
          y.addr = PARAM_BASE + q.off;
          y.thread_param = false;
        } else {
          u32 al = std::max<u32>(q.align, 4);
          u32 o = (M.local_bytes + al - 1) / al * al;
          y.addr = o;
          M.local_bytes = o + std::max<u32>(q.size, 4);
          y.thread_param = true;
        }
        int id = M.syms.size();
        M.syms.push_back(y);
        q.sym = id;
        if (q.name != "_") scopes.back().vars[q.name] = id;
        out.push_back(q);
      } while (accept(','));
    expect(')');
    if (total) *total = off;
  }
  void function(bool entry, bool) {
    Function* f = new Function;
    f->entry = entry;
    f->id = M.funcs.size();
    M.funcs.emplace_back(f);
    F = f;
    scopes.clear();
    fixes.clear();
    scope_id = 0;
    Scope s0;
    s0.id = 0;
    scopes.push_back(s0);
    if (!entry && acceptw(".attribute")) {
      expect('(');
      while (s[p] != ')') p++;
      p++;
    }
    if (!entry && peek() == '(') param_list(f->rets, nullptr, false);
    f->name = ident();
    if (peek() == '(') param_list(f->params, &f->param_bytes, entry);
    for (;;) {
      ws();
      if (s[p] != '.') break;
      std::string w = dotword().substr(1);
      auto dims = [&](u32* d) {
        d[0] = d[1] = d[2] = 1;
        int k = 0;
        do d[k++] = integer();
        while (accept(',') && k < 3);
      };
      if (w == "reqntid")
        dims(f->reqntid);
      else if (w == "maxntid")
        dims(f->maxntid);
      else if (w == "minnctapersm" || w == "maxnreg" || w == "maxclusterrank" ||
               w == "abi_preserve" || w == "abi_preserve_control")
        integer();
      else if (w == "reqnctapercluster")
        dims(f->cluster);
      else if (w == "explicitcluster" || w == "noreturn" || w == "blocksareclusters") {
      } else if (w == "pragma") {
        eol();
      } else if (w == "attribute") {
        expect('(');
        while (s[p] != ')') p++;
        p++;
      } else
        err("unknown function directive ." + w);
    }
    auto it = M.funcidx.find(f->name);
    if (accept(';')) {
      if (it == M.funcidx.end()) M.funcidx[f->name] = f->id;
      regfunc(f);
      F = nullptr;
      return;
    }
    f->has_body = true;
    M.funcidx[f->name] = f->id;
    regfunc(f);
    expect('{');
    int depth = 1;
    while (depth) {
      char c = peek();
      if (!c) err("unexpected end of file in function " + f->name);
      if (c == '{') {
        p++;
        depth++;
        Scope sc;
        sc.id = ++scope_id;
        scopes.push_back(sc);
        continue;
      }
      if (c == '}') {
        p++;
        depth--;
        pop_scope();
        continue;
      }
      if (c == ';') {
        p++;
        continue;
      }
      if (c == '.') {
        size_t save = p;
        std::string w = dotword().substr(1);
        if (w == "reg") {
          reg_decl();
          continue;
        }
        if (w == "loc" || w == "file") {
          eol();
          continue;
        }
        if (w == "pragma") {
          while (s[p] != ';') p++;
          p++;
          continue;
        }
        if (w == "local") {
          var_decl(SP_LOCAL, false, true);
          continue;
        }
        if (w == "shared") {
          var_decl(SP_SHARED, false, true);
          continue;
        }
        if (w == "param") {
          var_decl(SP_PARAM, false, true);
          continue;
        }
        if (w == "global" || w == "const") {
          var_decl(w == "global" ? SP_GLOBAL : SP_CONST, false, true);
          continue;
        }
        if (w == "section") {
          eol();
          skip_braces();
          continue;
        }
        p = save;
        err("unknown directive ." + w);
      }
      if (c == '@') {
        instruction();
        continue;
      }
      // label or instruction
      size_t save = p;
      u32 sl = line;
      std::string n = ident();
      ws();
      if (!n.empty() && p < s.size() && s[p] == ':' && s[p + 1] != ':') {
        p++;
        ws();
        if (looking(".branchtargets")) {
          dotword();
          BranchTable t;
          do t.labels.push_back(ident());
          while (accept(','));
          expect(';');
          f->tables[n] = t;
          continue;
        }
        if (looking(".callprototype")) {
          while (s[p] != ';') {
            if (s[p] == '\n') line++;
            p++;
          }
          p++;
          f->calltargets[n] = {};
          continue;
        }
        if (looking(".calltargets")) {
          dotword();
          std::vector<std::string> v;
          do v.push_back(ident());
          while (accept(','));
          expect(';');
          f->calltargets[n] = v;
          continue;
        }
        define_label(n);
        continue;
      }
      p = save;
      line = sl;
      instruction();
    }
    F = nullptr;
  }
  void regfunc(Function* f) {
    Symbol y;
    y.name = f->name;
    y.is_func = true;
    y.func = f->id;
    y.sp = SP_GLOBAL;
    y.size = 0;
    y.addr = FUNC_BASE + (u64)f->id * 16;
    auto it = M.symidx.find(f->name);
    if (it != M.symidx.end()) {
      if (f->has_body) {
        M.syms[it->second].func = f->id;
        M.syms[it->second].addr = y.addr;
      }
      f->sym = it->second;
      return;
    }
    f->sym = M.syms.size();
    M.syms.push_back(y);
    M.symidx[f->name] = f->sym;
  }
  void module() {
    while (!eof()) {
      u32 l0 = line;
      (void)l0;
      bool is_extern = false;
      if (s[p] == ';') {
        p++;
        continue;
      }
      if (s[p] != '.') err(strf("unexpected text '%.30s'", s.c_str() + p));
      for (;;) {
        std::string w = dotword().substr(1);
        if (w == "visible" || w == "weak" || w == "common") {
          ws();
          continue;
        }
        if (w == "extern") {
          is_extern = true;
          ws();
          continue;
        }
        if (w == "version") {
          ws();
          size_t b = p;
          while (p < s.size() && !isspace((unsigned char)s[p])) p++;
          M.version = s.substr(b, p - b);
          break;
        }
        if (w == "target") {
          ws();
          size_t b = p;
          eol();
          std::string t = s.substr(b, p - b);
          size_t k = t.find("sm_");
          if (k != std::string::npos) {
            M.target_sm = atoi(t.c_str() + k + 3);
            size_t q = k + 3;
            while (isdigit((unsigned char)t[q])) q++;
            M.target_a = t[q] == 'a';
          }
          break;
        }
        if (w == "address_size") {
          if (integer() != 64) err("only 64-bit addresses");
          break;
        }
        if (w == "file" || w == "loc") {
          eol();
          break;
        }
        if (w == "section") {
          ws();
          while (p < s.size() && s[p] != '{') p++;
          skip_braces();
          break;
        }
        if (w == "pragma") {
          while (s[p] != ';') p++;
          p++;
          break;
        }
        if (w == "entry") {
          function(true, is_extern);
          break;
        }
        if (w == "func") {
          function(false, is_extern);
          break;
        }
        if (w == "global") {
          var_decl(SP_GLOBAL, is_extern, false);
          break;
        }
        if (w == "const") {
          var_decl(SP_CONST, is_extern, false);
          break;
        }
        if (w == "shared") {
          var_decl(SP_SHARED, is_extern, false);
          break;
        }
        if (w == "alias") {
          std::string a = ident();
          expect(',');
          std::string b = ident();
          expect(';');
          if (!M.funcidx.count(b)) err("alias of unknown " + b);
          M.funcidx[a] = M.funcidx[b];
          if (M.symidx.count(a)) M.syms[M.symidx[a]].func = M.funcidx[b];
          break;
        }
        err("unknown directive ." + w);
      }
    }
    for (auto& y : M.syms)
      for (auto& q : y.pending) {
        int t = M.sym(q.second.first);
        if (t < 0)
          fail(Fault::Unsupported, "initialiser of %s refers to unknown symbol %s", y.name.c_str(),
               q.second.first.c_str());
        y.relocs.push_back({q.first, {t, q.second.second}});
      }
  }
};
void parse_module(Module& M, const std::string& text) {
  M.text = text;
  M.text.push_back('\n');
  size_t b = 0;
  for (size_t k = 0; k < M.text.size(); k++)
    if (M.text[k] == '\n') {
      M.lines.push_back(M.text.substr(b, k - b));
      b = k + 1;
    }
  Parser P(M);
  P.module();
  // functions first, every entry starts at the same register offset
  u32 off = 0;
  for (auto& f : M.funcs)
    if (!f->entry) {
      f->base = off;
      off += (f->frame + 63) / 64 * 64;
    }
  M.func_bytes = off;
  for (auto& f : M.funcs)
    if (f->entry) f->base = off;
}
}  // namespace vsim
